"""Private directories, and socket paths short enough for the kernel."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from service.folders import temporary_folder
from wire.errors import ConfigError

SOCKET_NAME = "broker.sock"
_RUN_PREFIX = "forebay-run-"

# sun_path holds 108 bytes on Linux and 104 on macOS, a terminating zero included.
_MAX_SOCKET_PATH_BYTES = 103


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
def run_directory() -> Iterator[Path]:
    """A private directory that lives as long as one run.

    What runs that were killed left behind goes first: it may hold prompts.
    """
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(temporary_folder(_RUN_PREFIX))
        except OSError as error:
            raise ConfigError(
                f"no directory can be made in {tempfile.gettempdir()}: {error.strerror}; "
                "set TMPDIR to a writable place"
            ) from error
        yield directory


def socket_path(directory: Path) -> Path:
    """Where the broker of `directory` listens: inside it or, if that is too long, in /tmp.

    The short place depends on nothing but the directory and the user, so that a client finds it.
    """
    inside = directory / SOCKET_NAME
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(f"/tmp/forebay-{os.getuid()}") / f"{digest}.sock"
