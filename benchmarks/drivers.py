"""The benchmark's end of the conversation with a contender (`benchmarks/peers/channel.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from benchmarks.process_tree import ROOT, end_tree
from benchmarks.processes import cpu_seconds, peak_bytes

_TAIL_BYTES = 2000
_STOP_TIMEOUT_S = 60.0


class DriverError(Exception):
    """A contender that could not start, or failed on the way; says what it last wrote."""


@dataclass(frozen=True, slots=True)
class Round:
    """One run of a workload: `outputs` are token ids by custom_id."""

    wall_s: float
    cpu_s: Mapping[str, float]
    peak_bytes: int
    outputs: Mapping[str, Sequence[int]]

    @property
    def total_cpu_s(self) -> float:
        """Over all kinds of processes."""
        return sum(self.cpu_s.values())


class Driver:
    """A contender: one process (with what it starts) that stays up from round to round.

    Use it as a context manager. `start_s` is from the command to being ready; `settings` and
    `versions` are what the contender says of itself.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.start_s = 0.0
        self.settings: Mapping[str, Any] = {}
        self.versions: Mapping[str, str] = {}
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, and wait until it is ready. Raises DriverError."""
        started_s = time.perf_counter()
        self._log = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=ROOT,
                env=self._environment,
            )
            ready = self._receive("ready")
        except BaseException:
            self._stop()
            raise
        self.start_s = time.perf_counter() - started_s
        self.settings, self.versions = ready["settings"], ready["versions"]
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        assert self._process is not None
        return self._process.pid

    def run(self, workload_path: Path) -> Round:
        """Run all requests of the file, with empty caches. Raises DriverError."""
        self._ask({"prepare": str(workload_path.absolute())}, "prepared")
        before = cpu_seconds(self.pid)
        wall_s = float(self._ask({"run": True}, "wall_s"))
        cpu_s = {k: s - before.get(k, 0.0) for k, s in cpu_seconds(self.pid).items()}
        outputs = self._ask({"outputs": True}, "outputs")
        return Round(wall_s, cpu_s, peak_bytes(self.pid), outputs)

    def _ask(self, order: Mapping[str, object], answer: str) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        # If it has ended, what it said last tells why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._receive(answer)

    def _receive(self, answer: str) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line.endswith("\n") else {}  # half a line: it has ended
        if answer not in message:
            why = message.get("error") or f"it ended; the last that it wrote:\n{self._tail()}"
            raise DriverError(f"{self.name}: {why}")
        return message[answer]

    def _tail(self) -> str:
        assert self._log is not None
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        return self._log.read().decode(errors="replace")

    def _stop(self) -> None:
        assert self._log is not None
        with self._log:
            if self._process is not None:
                # Waits for its end, after the end of the orders; then closes the other stream.
                with self._process as process:
                    try:
                        assert process.stdin is not None
                        with contextlib.suppress(BrokenPipeError):
                            process.stdin.close()
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(_STOP_TIMEOUT_S)
                    finally:
                        end_tree(process)
