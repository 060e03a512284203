"""How ranks come by memory that they share: rank 0 makes it, and hands it out over a socket.

The memory has no name in any file system, so that nothing is left of it when its processes are
gone, however they went. The connections stay: one that closes tells that a rank has ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.collectives.interface import CollectiveFailed

_RETRY_S = 0.005
_WORD = b"m"


@dataclass(frozen=True, slots=True)
class Meeting:
    """The descriptor of the shared memory, and connections: rank 0's to all, the others' to it."""

    memory_fd: int
    peers: tuple[socket.socket, ...]

    def close(self) -> None:
        """Let go of it. Mappings of the memory stay."""
        os.close(self.memory_fd)
        for peer in self.peers:
            peer.close()


def is_possible() -> bool:
    """Whether this system has nameless shared memory, and sockets that carry descriptors."""
    return sys.platform == "linux"


def meet(rank: int, size: int, place: Path, memory_bytes: int) -> Meeting:
    """Wait for the other ranks at `place`, however long it takes.

    There must be no such file yet, in a directory that only this user can enter; there is none
    afterwards. Rank 0 reserves `memory_bytes`, all zeros.
    """
    with _short_path(place) as path:
        return _host(size, path, memory_bytes) if rank == 0 else _join(path)


def _host(size: int, path: str, memory_bytes: int) -> Meeting:
    with contextlib.ExitStack() as unfinished:
        memory_fd = os.memfd_create("forebay-ranks")
        unfinished.callback(os.close, memory_fd)
        os.ftruncate(memory_fd, memory_bytes)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(size)
            peers = [unfinished.enter_context(listener.accept()[0]) for _ in range(size - 1)]
        os.unlink(path)
        for peer in peers:
            socket.send_fds(peer, [_WORD], [memory_fd])
        unfinished.pop_all()
        return Meeting(memory_fd, tuple(peers))


def _join(path: str) -> Meeting:
    with contextlib.ExitStack() as unfinished:
        peer = unfinished.enter_context(_connect(path))
        _, fds, _, _ = socket.recv_fds(peer, len(_WORD), maxfds=1)
        if not fds:
            raise CollectiveFailed("rank 0 ended before all ranks had come")
        unfinished.pop_all()
        return Meeting(fds[0], (peer,))


def _connect(path: str) -> socket.socket:
    while True:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):  # rank 0 is not there yet
            peer.close()
            time.sleep(_RETRY_S)
        else:
            return peer


@contextlib.contextmanager
def _short_path(place: Path) -> Iterator[str]:
    """Another name of `place`: a socket's may have only about a hundred characters."""
    directory_fd = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory_fd}/{place.name}"
    finally:
        os.close(directory_fd)
