"""Private directories with a lock each, and socket paths short enough for the kernel."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.errors import ConfigError

SOCKET_NAME = "broker.sock"
LOCK_NAME = "lock"
_RUN_PREFIX = "forebay-run-"

# sun_path holds 108 bytes on Linux and 104 on macOS, a terminating zero included.
_MAX_SOCKET_PATH_BYTES = 103

# A directory without a lock may be one that another process is making right now.
_MIN_AGE_OF_LITTER_S = 60.0


def private_directory(path: Path) -> Path:
    """Make `path` a directory of ours that nobody else can enter, and return it.

    Raises ConfigError when it cannot be made, or is not ours: in a shared place such as /tmp,
    somebody else may have been there first.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"the directory {path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{path} is not a directory of this user; move it away or name another")
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
    return path


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
def run_directory() -> Iterator[Path]:
    """A private directory that lives as long as one run.

    What runs that were killed left behind goes first: it may hold prompts.
    """
    _sweep()
    try:
        directory = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX))
    except OSError as error:
        raise ConfigError(
            f"no directory can be made in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a writable place"
        ) from error
    try:
        with exclusive(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def socket_path(directory: Path) -> Path:
    """Where the broker of `directory` listens: inside it or, if that is too long, in /tmp.

    The short place depends on nothing but the directory and the user, so that a client finds it.
    """
    inside = directory / SOCKET_NAME
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(f"/tmp/forebay-{os.getuid()}") / f"{digest}.sock"


def _sweep() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_RUN_PREFIX}*"):
        try:
            status = directory.lstat()
            young = time.time() - status.st_mtime < _MIN_AGE_OF_LITTER_S
            if young or status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                continue
            with exclusive(directory):
                shutil.rmtree(directory, ignore_errors=True)
        except (OSError, ConfigError):
            continue  # in use, or gone by now
