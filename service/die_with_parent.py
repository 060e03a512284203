"""A process that must not outlive the one that started it.

In Python: call `die_with_parent`. For any other program, and to leave no moment unguarded, run
this file as a script, which asks the kernel and then becomes the program:

    python -I -S die_with_parent.py PARENT_PID SIGNAL program [argument ...]

Only the standard library is imported, and little of it: the detour costs some 15 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process `signal_number` when its parent ends.

    The request survives exec. Linux only: elsewhere this does nothing, and an orphan has to be
    found by other means. `parent_pid` is the pid that the caller was started by: when it is gone
    already, the signal would never come, so the process ends at once.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)


def command_line(
    program: list[str], *, signal_number: int = signal.SIGKILL, parent_pid: int | None = None
) -> list[str]:
    """The command that runs `program` as a child that dies with its parent (this process)."""
    parent = os.getpid() if parent_pid is None else parent_pid
    script = os.path.abspath(__file__)
    return [sys.executable, "-I", "-S", script, str(parent), str(int(signal_number)), *program]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
