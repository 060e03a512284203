"""A file of lines, one after another, in bounded memory: also a pipe, or standard input."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from io import FileIO

from producer.batch.blocking import in_daemon_thread
from wire.errors import FileError

STANDARD_STREAM = "-"

_CHUNK_BYTES = 64 * 1024  # parsing this many bytes of short rows takes some 10 ms
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its break, which only a last one may lack.

    `content` is None if it is longer than allowed.
    """

    number: int
    content: bytes | None
    size_bytes: int
    has_break: bool = True


class LineReader:
    """Reads from the start to the end, and again after `rewind`.

    Raises FileError if `path` cannot be opened; `purpose` says there what it was wanted for.
    `max_line_bytes` bounds what one line may hold in memory: a longer one is counted and skipped.
    """

    def __init__(self, path: str, *, max_line_bytes: int, purpose: str = "the input") -> None:
        self.name = "standard input" if path == STANDARD_STREAM else path
        self._max_line_bytes = max_line_bytes
        try:
            # Unbuffered: a thread that waits in a buffered read of standard input holds a lock
            # that the interpreter needs to exit.
            self._file = FileIO(0, closefd=False) if path == STANDARD_STREAM else FileIO(path, "rb")
            self.status = os.fstat(self._file.fileno())
        except OSError as error:
            raise FileError(
                f"cannot read {purpose} {self.name}: {error.strerror}; give a file that exists "
                f"and is readable, or - for standard input"
            ) from error
        self.is_regular = stat.S_ISREG(self.status.st_mode)
        # A shell may hand over a file that it has read a part of.
        self._start_bytes = self._file.tell() if self.is_regular else 0
        self._waiting = False
        self._num_bytes_used = 0

    def close(self) -> None:
        """Close the file, unless a thread still waits for it to say something."""
        if not self._waiting:
            self._file.close()

    @property
    def used_fraction(self) -> float | None:
        """How much of the input the lines given out so far are; None if its size is unknown."""
        if not self.is_regular or self.status.st_size == 0:
            return None
        return min(1.0, self._num_bytes_used / self.status.st_size)

    def rewind(self) -> None:
        """Go back to the start, which only a regular file can."""
        self._file.seek(self._start_bytes)
        self._num_bytes_used = 0

    async def lines(self) -> AsyncGenerator[Line, None]:
        """Every line. Raises FileError if reading fails on the way."""
        number = 0
        parts: list[bytes] = []  # of the line that the last chunk left unfinished
        size_bytes = 0
        while chunk := await self._read_chunk():
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                number += 1
                parts.append(end)
                yield self._line(number, parts, size_bytes + len(end))
                parts, size_bytes = [], 0
            size_bytes += len(rest)
            if size_bytes <= self._max_line_bytes:
                parts.append(rest)
            else:
                parts.clear()
        if size_bytes:
            yield self._line(number + 1, parts, size_bytes, has_break=False)

    def _line(
        self, number: int, parts: list[bytes], size_bytes: int, *, has_break: bool = True
    ) -> Line:
        self._num_bytes_used += size_bytes + has_break
        if size_bytes > self._max_line_bytes:
            return Line(number, None, size_bytes, has_break)
        content = b"".join(parts)
        if number == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        return Line(number, content, size_bytes, has_break)

    async def _read_chunk(self) -> bytes:
        try:
            if self.is_regular:
                await asyncio.sleep(0)  # a file full of refused rows must not hold up the loop
                return self._file.read(_CHUNK_BYTES) or b""
            self._waiting = True
            chunk = await in_daemon_thread(partial(self._file.read, _CHUNK_BYTES))
            self._waiting = False
            return chunk or b""
        except OSError as error:
            raise FileError(f"cannot read {self.name} further: {error.strerror}") from error
