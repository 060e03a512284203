"""A connected socket on which whole buffers move, within a deadline.

Each call is as few system calls as the kernel needs, and all of them let other threads of Python
run: a rank that serves its blocks is computing at the same time. That is why the time limit is the
socket's own (SO_RCVTIMEO, SO_SNDTIMEO) and not Python's, which would make the socket non-blocking
and wake up for every few KiB.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed

_TIMEVAL = struct.Struct("@ll")


class TimedStream:
    """All methods raise TransferFailed, and then the stream `is_broken`: of no use any more.

    `deadline` may be replaced between two calls.
    """

    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        self.deadline = deadline
        self.is_broken = False
        self._socket = connected

    def receive(self, num_bytes: int) -> bytearray:
        """Exactly so many bytes, which the caller has checked to be a sane number."""
        data = bytearray(num_bytes)
        self.receive_into(memoryview(data))
        return data

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`, whose items are bytes."""
        with self._breaking():
            while view:
                self._limit(socket.SO_RCVTIMEO)
                num_bytes = self._socket.recv_into(view, flags=socket.MSG_WAITALL)
                if not num_bytes:
                    raise TransferFailed("the other side closed the connection")
                view = view[num_bytes:]

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all buffers."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        with self._breaking():
            while views:
                self._limit(socket.SO_SNDTIMEO)
                views = _after(views, self._socket.sendmsg(views))

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Broken, unless all goes well."""
        was_broken, self.is_broken = self.is_broken, True
        try:
            yield
        except BlockingIOError as error:
            raise TransferFailed("the other side has stopped, or is too slow") from error
        except OSError as error:
            raise TransferFailed(f"the connection broke: {error}") from error
        self.is_broken = was_broken

    def _limit(self, option: int) -> None:
        # All zeros would mean no limit.
        microseconds = max(1, int(self.deadline.remaining_s() * 1e6))
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        )


def _after(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `views` after their first bytes."""
    left = []
    for view in views:
        skipped = min(num_bytes, len(view))
        num_bytes -= skipped
        if skipped < len(view):
            left.append(view[skipped:])
    return left
