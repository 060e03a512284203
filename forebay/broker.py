"""The embedded broker: a real Redis or Valkey server, started and ended by us.

It listens on a Unix socket in a private directory and on nothing else, keeps an append-only file
there (fsync every second), never evicts, and dies with its parent. Where the kernel cannot
promise the latter, a server whose parent was killed goes on: `Broker.attach` finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from pathlib import Path

import structlog

from forebay.broker_binary import BrokerBinary, find_broker
from forebay.paths import private_directory, socket_path
from service.die_with_parent import command_line
from wire.errors import ServerUnreachable

_POLL_S = 0.01
_ATTACHED_POLL_S = 0.5
_STOP_TIMEOUT_S = 10.0
_LOG_NAME = "broker.log"


class Broker:
    """A running server; `url` is how to reach it. Made by `start` or `attach`."""

    def __init__(self, directory: Path, process: Process | None) -> None:
        self.directory = directory
        self.socket = socket_path(directory)
        self.url = broker_url(directory)
        self._process = process

    @classmethod
    async def start(
        cls, directory: Path, *, binary: BrokerBinary | None = None, timeout_s: float = 60.0
    ) -> Broker:
        """Start a server on the data in `directory` and wait until it answers.

        Raises ConfigError when there is no server to start, ServerUnreachable with the server's
        own last words when it ends, or does not answer within `timeout_s`.
        """
        binary = find_broker() if binary is None else binary
        private_directory(directory)
        socket = socket_path(directory)
        private_directory(socket.parent)
        with (directory / _LOG_NAME).open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                # A server that is told to terminate writes out what it holds.
                *command_line(server_arguments(binary, directory), signal_number=signal.SIGTERM),
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                start_new_session=True,
            )
        broker = cls(directory, process)
        try:
            await broker._wait_until_ready(timeout_s)
        except BaseException:
            await broker.stop()
            raise
        structlog.get_logger().info(
            "broker_started",
            product=binary.product,
            version=binary.version_text,
            source=binary.source,
            path=str(binary.path),
            socket=str(socket),
        )
        return broker

    @classmethod
    async def attach(cls, directory: Path) -> Broker | None:
        """The server that still runs on `directory` though its parent is gone, if any."""
        broker = cls(directory, None)
        if not await broker.answers():
            return None
        structlog.get_logger().info("broker_attached", socket=str(broker.socket))
        return broker

    @classmethod
    async def start_or_attach(
        cls, directory: Path, *, binary: BrokerBinary | None = None, timeout_s: float = 60.0
    ) -> Broker:
        """`attach`, else `start`. The caller holds the directory's lock."""
        attached = await cls.attach(directory)
        return attached or await cls.start(directory, binary=binary, timeout_s=timeout_s)

    async def answers(self) -> bool:
        """Whether the server is up and has loaded its data."""
        return (await self._ask(b"PING")).startswith(b"+PONG")

    async def wait(self) -> None:
        """Return when the server has ended."""
        if self._process is not None:
            await self._process.wait()
            return
        while await self._ask(b"PING"):
            await asyncio.sleep(_ATTACHED_POLL_S)

    async def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """End the server in an orderly way; kill it if it takes longer than `timeout_s`."""
        if self._process is None:
            await self._ask(b"SHUTDOWN")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), timeout_s)
        elif self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self.socket.parent != self.directory:
            self.socket.unlink(missing_ok=True)

    def was_killed(self) -> bool:
        """Whether a signal ended it; of one that was attached to nothing is known but its end."""
        return self._process is None or (self._process.returncode or 0) < 0

    def failure(self) -> ServerUnreachable:
        """Why it ended, as an error: the signal that killed it, or the last line it logged."""
        status = None if self._process is None else self._process.returncode
        how = f"killed by signal {-status}" if status and status < 0 else self._last_words()
        return ServerUnreachable(f"the embedded broker ended: {how}")

    def _last_words(self) -> str:
        log = (self.directory / _LOG_NAME).read_bytes()[-4096:].decode(errors="replace")
        return next((line for line in reversed(log.splitlines()) if line.strip()), "no output")

    async def _wait_until_ready(self, timeout_s: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while not await self.answers():
            if self._process.returncode is not None:
                raise self.failure()
            if time.monotonic() > deadline:
                raise ServerUnreachable(
                    f"the embedded broker did not answer within {timeout_s:g} s: "
                    f"{self._last_words()}"
                )
            await asyncio.sleep(_POLL_S)

    async def _ask(self, command: bytes) -> bytes:
        """The first line of the server's reply; empty when nobody answers."""
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
                try:
                    writer.write(command + b"\r\n")
                    return await reader.readline()
                finally:
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            return b""


def broker_url(directory: Path) -> str:
    """Where a broker on `directory` is to be reached."""
    return f"unix://{socket_path(directory)}"


def server_arguments(binary: BrokerBinary, directory: Path) -> list[str]:
    """The command that runs `binary` on the data in `directory`."""
    options = {
        "port": "0",
        "unixsocket": str(socket_path(directory)),
        "unixsocketperm": "700",
        "dir": str(directory),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        # What a group had cached may be a set of a million names.
        "lazyfree-lazy-expire": "yes",
    }
    return [str(binary.path), *(part for name in options for part in (f"--{name}", options[name]))]
