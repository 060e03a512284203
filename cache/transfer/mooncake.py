"""Bytes of runs by Mooncake's transfer engine, for fabrics with RDMA: opt-in, and why.

    pip install 'forebay[mooncake]'      and the system's libibverbs (Debian: libibverbs1)

The engine listens on all interfaces, whatever host it is given, and authenticates nobody: who
reaches its ports can read, *and write*, all memory that is registered with it. So the host slots
are not. Each request moves through *windows*, small pieces of registered memory:

    exporter   copies a run into a half of its window, and says where it lies      RunPlaced
    importer   has the engine read it into its own window, copies it out of there  RunTaken

Requests, tickets and digests go over our own authenticated connection, and digests are of the
private copies on both sides: whoever writes into a window makes a transfer fail, no more. What
passes through windows can be read by anybody who reaches them.

A read cannot be interrupted. One from a peer that has stopped returns after the engine's own time
limit (MC_TRANSFER_TIMEOUT, set to 5 s here unless the environment has it), and may even then still
write into the window. That harms nothing as long as the window is there: this object is to live as
long as its process.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cache.transfer.connection import Connection
from cache.transfer.failures import TransferFailed
from cache.transfer.messages import RunPlaced, RunTaken
from cache.transfer.planning import RUN_BYTES
from wire.errors import ConfigError

_NO_METADATA_SERVER = "P2PHANDSHAKE"
_TIMEOUT_VARIABLE, _TIMEOUT_S = "MC_TRANSFER_TIMEOUT", 5
_HALVES = 2
"""The exporter fills one while the importer reads the other."""

Window = NDArray[np.uint8]
"""(_HALVES, bytes of the largest run)."""


class MooncakeTransport:
    """Its `host` is how peers reach this machine; `piece_bytes` as in `BlockLayout`.

    `protocol` is `rdma` or `tcp`, `device` the name of an RDMA device. As many requests are sent,
    and as many received, at a time as there are `num_windows`. Raises ConfigError if the engine is
    missing or does not start.
    """

    name: ClassVar[str] = "mooncake"

    def __init__(
        self,
        host: str,
        piece_bytes: int,
        *,
        protocol: str = "rdma",
        device: str = "",
        num_windows: int = 8,
    ) -> None:
        # The engine comes first, and so goes first: it writes into the windows.
        self._engine = _start_engine(host, protocol, device)
        self._place = f"{host}:{self._engine.get_rpc_port()}"
        shape = (2, num_windows, _HALVES, max(RUN_BYTES, piece_bytes))
        self._memory = np.zeros(shape, np.uint8)
        if self._engine.register_memory(self._memory.ctypes.data, self._memory.nbytes):
            raise ConfigError(f"Mooncake does not register {self._memory.nbytes} bytes")
        self._for_sending, self._for_receiving = (_queue_of(windows) for windows in self._memory)
        structlog.get_logger(__name__).warning(
            "mooncake_listens_on_all_interfaces_without_authentication",
            place=self._place,
            protocol=protocol,
        )

    @contextlib.contextmanager
    def sending(self, connection: Connection) -> Iterator[_WindowSender]:
        """See `Transport`."""
        with _one_of(self._for_sending, connection) as window:
            sender = _WindowSender(connection, window, self._place)
            yield sender
            sender.await_taken(0)

    @contextlib.contextmanager
    def receiving(self, connection: Connection) -> Iterator[_WindowReceiver]:
        """See `Transport`."""
        with _one_of(self._for_receiving, connection) as window:
            yield _WindowReceiver(connection, window[0], self._engine)


class _WindowSender:
    def __init__(self, connection: Connection, window: Window, place: str) -> None:
        self._connection = connection
        self._window = window
        self._place = place
        self._num_sent = 0
        self._num_taken = 0

    def send(self, digest: bytes, parts: Sequence[memoryview]) -> None:
        self.await_taken(_HALVES - 1)
        half = self._window[self._num_sent % _HALVES]
        end = 0
        for part in parts:
            half[end : end + len(part)] = np.frombuffer(part, np.uint8)
            end += len(part)
        self._connection.send(RunPlaced(digest, self._place, half.ctypes.data))
        self._num_sent += 1

    def await_taken(self, num_left: int) -> None:
        """Wait until all runs but the last `num_left` have been taken."""
        while self._num_sent - self._num_taken > num_left:
            self._connection.receive_only(RunTaken)
            self._num_taken += 1


class _WindowReceiver:
    def __init__(self, connection: Connection, half: NDArray[np.uint8], engine: Any) -> None:
        self._connection = connection
        self._half = half
        self._engine = engine

    def receive_into(self, memory: memoryview) -> bytes:
        placed = self._connection.receive_only(RunPlaced)
        code = self._engine.transfer_sync_read(
            placed.place, self._half.ctypes.data, placed.address, len(memory)
        )
        if code:
            raise TransferFailed(f"Mooncake cannot read from {placed.place} (code {code})")
        # numpy copies without Python's global lock.
        np.frombuffer(memory, np.uint8)[:] = self._half[: len(memory)]
        self._connection.send(RunTaken())
        return placed.digest


def _start_engine(host: str, protocol: str, device: str) -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(f"Mooncake's transfer engine cannot be loaded: {error}") from error
    os.environ.setdefault(_TIMEOUT_VARIABLE, str(_TIMEOUT_S))
    engine = TransferEngine()
    if code := engine.initialize(host, _NO_METADATA_SERVER, protocol, device):
        raise ConfigError(f"Mooncake does not start with {protocol} on {host} (code {code})")
    return engine


def _queue_of(windows: NDArray[np.uint8]) -> queue.SimpleQueue[Window]:
    free: queue.SimpleQueue[Window] = queue.SimpleQueue()
    for window in windows:
        free.put(window)
    return free


@contextlib.contextmanager
def _one_of(free: queue.SimpleQueue[Window], connection: Connection) -> Iterator[Window]:
    try:
        window = free.get(timeout=connection.stream.deadline.remaining_s())
    except queue.Empty:
        raise TransferFailed("all windows are taken") from None
    try:
        yield window
    finally:
        free.put(window)
