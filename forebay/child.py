"""A service as a child process: started, listened to, and ended with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from service.command import ERROR_PREFIX
from service.die_with_parent import command_line
from service.exit_codes import ExitCode
from wire.errors import ConfigError, ForebayError, ModelError, PipelineFailed

_TAIL_BYTES = 16 * 1024
_READ_BYTES = 64 * 1024
_ORPHANS_TIMEOUT_S = 1.0


class Child:
    """One child in a process group of its own, which dies with us.

    What it writes goes to `log_path`, and with `echo` to our stderr as well. Ctrl-C on the
    terminal does not reach it: its parent ends it, in the right order.
    """

    def __init__(self, name: str, process: Process, log: BinaryIO, *, echo: bool) -> None:
        self.name = name
        self._process = process
        self._tail = bytearray()
        self._listener = asyncio.create_task(self._listen(log, echo), name=f"listen-{name}")

    @classmethod
    async def start(
        cls,
        name: str,
        program: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        echo: bool,
    ) -> Child:
        """Start `program` with `environment` as the whole of its environment."""
        process = await asyncio.create_subprocess_exec(
            *command_line(list(program)),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        # Behind what an earlier life of the same child has written.
        return cls(name, process, log_path.open("ab", buffering=0), echo=echo)

    async def wait(self) -> int:
        """Return its exit status once it has ended and everything it wrote was read."""
        status = await self._process.wait()
        await self._end_of_output()
        return status

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; after `timeout_s` kill it, and all that it started."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            # Not yet waited for, so the process group is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        await self._end_of_output()

    def was_killed(self) -> bool:
        """Whether a signal ended it."""
        return (self._process.returncode or 0) < 0

    def failure(self) -> ForebayError:
        """Why it ended early, in its own words, as the error that fits its exit status."""
        status = self._process.returncode
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        said = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
        if status == ExitCode.UNUSABLE_FILE and said:
            return ModelError(said[-1])
        if status == ExitCode.USAGE and said:
            return ConfigError(said[-1])
        how = f"was killed by signal {-status}" if status and status < 0 else f"exited ({status})"
        last_line = next((line for line in reversed(said or lines) if line), "it wrote nothing")
        return PipelineFailed(f"the {self.name} process {how}: {last_line}")

    async def _end_of_output(self) -> None:
        """Wait until nobody holds its output open any more, and see to it that this comes soon.

        The pipe's end is the sign that all that it started has ended too.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._listener), _ORPHANS_TIMEOUT_S)
        except TimeoutError:
            # Somebody lives in the process group: its number cannot have been given away.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.shield(self._listener)

    async def _listen(self, log: BinaryIO, echo: bool) -> None:
        assert self._process.stdout is not None
        with log:
            while data := await self._process.stdout.read(_READ_BYTES):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                # Read on, whatever becomes of it: a child whose output nobody takes would block.
                with contextlib.suppress(OSError):
                    log.write(data)
                if echo:
                    with contextlib.suppress(OSError):
                        sys.stderr.buffer.write(data)
                        sys.stderr.buffer.flush()
