"""The output: whole lines, appended as rows finish, each one in the file before the next is taken.

What is written stays written: a write that fails half way is undone, and nothing follows it.
"""

from __future__ import annotations

import asyncio
import os
import stat

from producer.batch.blocking import in_daemon_thread
from producer.batch.reader import STANDARD_STREAM
from wire.errors import FileError


class LineWriter:
    """Appends lines to a file, or to standard output. Raises ConfigError if it cannot be opened.

    Nothing that the file holds is touched before `start`.
    """

    def __init__(self, path: str, *, purpose: str) -> None:
        self.path = path
        self.name = "standard output" if path == STANDARD_STREAM else path
        self.num_lines = 0
        self._lock = asyncio.Lock()
        self._failure: OSError | None = None
        self._waiting = False
        self._owned = path != STANDARD_STREAM
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._fd = os.open(path, flags, 0o666) if self._owned else 1
            self.status = os.fstat(self._fd)
        except OSError as error:
            raise FileError(
                f"cannot write the {purpose} to {self.name}: {error.strerror}; give a path in a "
                f"directory that exists and is writable, or - for standard output"
            ) from error
        self._is_regular = stat.S_ISREG(self.status.st_mode)

    @property
    def holds_bytes(self) -> int:
        """How much of earlier work is in the file; 0 for one that a shell opened for us."""
        return self.status.st_size if self._owned and self._is_regular else 0

    def start(self) -> None:
        """Empty the file. Raises FileError if it cannot be emptied."""
        try:
            if self.holds_bytes:
                os.ftruncate(self._fd, 0)
        except OSError as error:
            raise self._failed(error) from error

    async def append(self, line: bytes) -> None:
        """Write one line, line break included. Raises FileError if the disk does not take it."""
        async with self._lock:
            try:
                if self._is_regular:
                    self._write(line)
                else:
                    # Whoever reads the pipe may take their time.
                    self._waiting = True
                    await in_daemon_thread(lambda: self._write(line))
                    self._waiting = False
            except OSError as error:
                self._failure = error
                raise self._failed(error) from error
            self.num_lines += 1

    def close(self) -> None:
        """Make sure that the disk has it all. Raises FileError if it does not.

        A pipe that a cancelled write still waits for is left to the end of the process.
        """
        if not self._owned or self._waiting:
            return
        try:
            if self._is_regular and self._failure is None:
                os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._fd)

    def _write(self, line: bytes) -> None:
        if self._failure is not None:
            raise self._failure
        num_written = 0
        try:
            while num_written < len(line):
                num_written += os.write(self._fd, line[num_written:])
        except OSError:
            if self._owned and self._is_regular and num_written:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - num_written)
            raise

    def _failed(self, error: OSError) -> FileError:
        return FileError(
            f"cannot write to {self.name}: {error.strerror}; the {self.num_lines} rows written "
            f"before are safe"
        )
