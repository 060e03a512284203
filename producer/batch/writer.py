"""The output: whole lines, appended as rows finish, each one in the file before the next is taken.

What is written stays written. A line is handed to the kernel as a whole, so the end of the process
loses none, however it comes; a crash of the machine can lose what the kernel had not put on the
disk yet (some 30 s, and then a run that goes on runs those rows again). The disk is made to have
it all (fsync) when the file is closed and when a full disk makes the run pause, and before a file
that was rewritten takes the place of the old one.

A write that fails half way is undone. On a full disk (or at the end of a quota) it is tried again
until there is space, and meanwhile whoever appends waits, and with them the run. After any other
error nothing more is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Callable

from producer.batch.blocking import in_daemon_thread
from producer.batch.file_lock import lock
from producer.batch.reader import STANDARD_STREAM, LineReader
from wire.codec import MAX_MESSAGE_BYTES
from wire.errors import FileError

Notify = Callable[[str], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 10.0
_MAX_ROW_BYTES = 8 * MAX_MESSAGE_BYTES  # JSON spells a result out at greater length
_REWRITTEN_SUFFIX = ".forebay-rewrite"


class LineWriter:
    """Appends lines to a file, or to standard output. Raises FileError if it cannot be opened.

    Nothing that the file holds is touched before `start`. Only a regular file that was opened
    here can be read back and gone on with: `is_resumable`.
    """

    def __init__(self, path: str, *, purpose: str) -> None:
        self.path = path
        self.name = "standard output" if path == STANDARD_STREAM else path
        self.was_there = False
        self._purpose = purpose
        self._notify: Notify = lambda line: None
        self._no_lock: OSError | None = None
        self._one_at_a_time = asyncio.Lock()
        self._failure: OSError | None = None
        self._waiting = False
        self._open()

    def _open(self) -> None:
        self._owned = self.path != STANDARD_STREAM
        try:
            self._fd = self._open_owned() if self._owned else 1
            self.status = os.fstat(self._fd)
        except OSError as error:
            raise FileError(
                f"cannot write the {self._purpose} to {self.name}: {error.strerror}; give a path "
                f"in a directory that exists and is writable, or - for standard output"
            ) from error
        self._is_regular = stat.S_ISREG(self.status.st_mode)

    def _open_owned(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            return os.open(self.path, flags | os.O_EXCL, 0o666)
        except FileExistsError:
            self.was_there = True
            return os.open(self.path, flags, 0o666)

    @property
    def is_resumable(self) -> bool:
        """Whether what is written can be read back, and appended to, by a later run."""
        return self._owned and self._is_regular

    @property
    def holds_bytes(self) -> int:
        """How much of earlier work is in the file; 0 for one that a shell opened for us."""
        return self.status.st_size if self.is_resumable else 0

    def claim(self) -> None:
        """Lock the file, until it is closed. Raises FileError if another run writes it."""
        if not self.is_resumable:
            return
        self._no_lock = lock(self._fd, self.name)
        while not self._is_current():  # whoever held it has put a rewritten file in its place
            os.close(self._fd)
            self._open()
            self._no_lock = lock(self._fd, self.name)
        self.status = os.fstat(self._fd)

    def start(self, notify: Notify, *, keep_bytes: int = 0) -> None:
        """Cut the file down to `keep_bytes`; from now on, `notify` gets lines for people.

        Raises FileError if it cannot be cut.
        """
        self._notify = notify
        if self._no_lock is not None:
            notify(
                f"{self.name} cannot be locked ({self._no_lock.strerror}): see to it yourself that "
                f"no other run writes it"
            )
        if not self.is_resumable:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._successor_path)  # of a run that was killed while it rewrote
            if os.fstat(self._fd).st_size > keep_bytes:
                os.ftruncate(self._fd, keep_bytes)
        except OSError as error:
            raise self._failed(error) from error

    async def append(self, line: bytes) -> None:
        """Write one line, line break included. Raises FileError if the disk does not take it."""
        async with self._one_at_a_time:
            try:
                if self._is_regular:
                    await self._write_patiently(line)
                else:
                    # Whoever reads the pipe may take their time.
                    self._waiting = True
                    await in_daemon_thread(lambda: self._write(line))
                    self._waiting = False
            except OSError as error:
                self._failure = error
                raise self._failed(error) from error

    def read_back(self) -> LineReader:
        """What the file holds. Raises FileError if it may not be read."""
        return LineReader(self.path, max_line_bytes=_MAX_ROW_BYTES, purpose="the earlier rows of")

    def successor(self) -> LineWriter:
        """A new, empty file beside this one, to `become` it. Raises FileError."""
        new = LineWriter(self._successor_path, purpose=self._purpose)
        try:
            new.claim()
            os.fchmod(new._fd, stat.S_IMODE(self.status.st_mode))
            new._notify = self._notify
        except BaseException:
            new.abandon()
            raise
        return new

    def become(self, successor: LineWriter) -> None:
        """Let `successor` take the place of this file, in one step. Raises FileError."""
        try:
            os.fsync(successor._fd)
            os.replace(successor.path, os.path.realpath(self.path))
        except OSError as error:
            raise self._failed(error) from error
        self._fd, successor._fd = successor._fd, self._fd
        self.status = os.fstat(self._fd)
        os.close(successor._fd)

    def abandon(self) -> None:
        """Close and delete the file."""
        os.close(self._fd)
        os.unlink(self.path)

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

    async def _write_patiently(self, line: bytes) -> None:
        delay_s, paused = _FIRST_DELAY_S, False
        while True:
            try:
                self._write(line)
                break
            except OSError as error:
                if error.errno not in _FULL or not self.is_resumable:
                    raise
                if not paused:
                    paused = True
                    os.fsync(self._fd)
                    self._notify(self._pause_line(error, len(line)))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
        if paused:
            self._notify(f"there is space for {self.name} again: the run goes on")

    def _write(self, line: bytes) -> None:
        if self._failure is not None:
            raise self._failure
        num_written = 0
        try:
            while num_written < len(line):
                num_written += os.write(self._fd, line[num_written:])
        except OSError:
            if self.is_resumable and num_written:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - num_written)
            raise

    def _pause_line(self, error: OSError, num_bytes: int) -> str:
        system = os.fstatvfs(self._fd)
        free = f", {system.f_bavail * system.f_frsize} are free"
        return (
            f"paused: cannot write to {self.name}: {error.strerror} (the next row takes "
            f"{num_bytes} bytes{free if error.errno == errno.ENOSPC else ''}); make space and the "
            f"run goes on, or stop it and give the same command later"
        )

    def _failed(self, error: OSError) -> FileError:
        return FileError(
            f"cannot write to {self.name}: {error.strerror}; the rows written before are safe, "
            f"and the same command goes on from them"
            if self.is_resumable
            else f"cannot write to {self.name}: {error.strerror}"
        )

    @property
    def _successor_path(self) -> str:
        return os.path.realpath(self.path) + _REWRITTEN_SUFFIX

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False
