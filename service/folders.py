"""Folders that one process has for itself, and temporary ones that do not outlive their owners."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.errors import ConfigError

LOCK_NAME = "lock"

# A directory without a lock may be one that another process is making right now.
_MIN_AGE_OF_LITTER_S = 60.0


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. Raises ConfigError when another process holds it.

    The kernel lets go of the lock when its holder ends, however it ends.
    """
    with (directory / LOCK_NAME).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{directory} is in use by process {lock.read().strip() or '?'}; "
                "stop that one, or name another --state-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A private directory that lives as long as its owner needs it.

    What owners that were killed have left under the same prefix goes first. Raises OSError.
    """
    _sweep(prefix)
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with exclusive(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(prefix: str) -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            status = directory.lstat()
            young = time.time() - status.st_mtime < _MIN_AGE_OF_LITTER_S
            if young or status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                continue
            with exclusive(directory):
                shutil.rmtree(directory, ignore_errors=True)
        except (OSError, ConfigError):
            continue  # in use, or gone by now
