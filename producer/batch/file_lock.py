"""A lock on an open file, which the kernel lets go of when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os

from wire.errors import FileError


def lock(fd: int, name: str) -> OSError | None:
    """Lock the file against other runs; the reason if its file system knows no locks.

    Raises FileError, naming the process if the kernel tells, when another run holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process_id = _holder(os.fstat(fd))
        process = "" if process_id is None else f" (process {process_id})"
        raise FileError(
            f"{name} is being written by another run{process}; wait for its end, or choose "
            f"another path"
        ) from None
    except OSError as error:
        return error
    return None


def _holder(status: os.stat_result) -> int | None:
    # 1: FLOCK  ADVISORY  WRITE 4711 08:02:131090 0 EOF
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    place = f"{device}:{status.st_ino}"
    with contextlib.suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and place in fields and fields[4].isdigit():
                return int(fields[4])
    return None
