"""Processes that a benchmark starts: whatever happens to it, they and theirs end."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[1]
"""Where the project's modules are found with `python -m`."""

_END_TIMEOUT_S = 10.0


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, started in the project's directory.

    Leaving the context waits for its end; leaving it by an exception ends the whole tree first.
    """
    process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=ROOT)
    try:
        yield process
        process.wait()
    finally:
        end_tree(process)


def end_tree(process: subprocess.Popen[Any]) -> None:
    """End the process, if it still runs, and all its descendants; return when they have ended.

    The process gets the chance to take its tree down in order and to remove its files; what is
    there after it, or after ten seconds, is killed.
    """
    if process.poll() is not None:
        return
    descendants = list(tree(process.pid))[1:]
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        descendants += list(tree(process.pid))[1:]
        process.kill()
        process.wait()
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):  # it has ended
            descendant.kill()
    psutil.wait_procs(descendants, timeout=_END_TIMEOUT_S)


def tree(pid: int) -> Iterator[psutil.Process]:
    """The process and its living descendants, as far as they have not ended meanwhile."""
    try:
        root = psutil.Process(pid)
        yield root
        yield from root.children(recursive=True)
    except psutil.Error:
        return


def children_cpu_s() -> float:
    """CPU seconds of all children that have ended and been waited for, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system
