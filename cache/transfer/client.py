"""The importing side: asking for blocks, and fetching them into slots that nobody reads yet.

    rank 0       lease = borrow(...)             then it tells the other ranks of the lease
    every rank   report = fetch_blocks(...)      all at the same time
    rank 0       give_back(...)                  when every rank has ended, however it ended

All of them block, for a bounded time: they are meant for a thread beside the engine. Whatever goes
wrong is a TransferFailed, and then the slots hold nothing of use: the blocks are computed instead.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.transfer.addresses import Address
from cache.transfer.connection import Connection
from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed
from cache.transfer.handshake import RankName, greet
from cache.transfer.keys import TransferKeys, is_mac
from cache.transfer.messages import (
    HASH_BYTES,
    FetchPieces,
    LeaseGranted,
    LeaseRequest,
    Released,
    ReleaseLease,
)
from cache.transfer.planning import blocks_per_run, divide_heads, runs
from cache.transfer.slots import HostSlots, digest
from cache.transfer.stream import TimedStream
from cache.transfer.ticket import read_ticket
from cache.transfer.transport import SocketTransport, Transport
from wire.errors import ConfigError
from wire.ids import GroupId


@dataclass(frozen=True, slots=True)
class Lease:
    """What an exporter lends: for the ranks of the importer, who may all be told."""

    exporter: GroupId
    epoch: int
    grant: LeaseGranted


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What one rank has fetched, and how long it took."""

    num_bytes: int
    seconds: float


def borrow(
    address: str,
    exporter: GroupId,
    epoch: int,
    request: LeaseRequest,
    keys: TransferKeys,
    *,
    timeout_s: float,
) -> Lease:
    """Ask rank 0 of a group, at `address`, for blocks. Raises TransferFailed.

    The lease names as many of the first blocks as it has.
    """
    name = RankName(exporter, epoch, 0)
    with _connected(address, name, keys, Deadline(timeout_s)) as (_, connection):
        connection.send(request)
        grant = connection.receive_only(LeaseGranted)
    ticket = read_ticket(grant.ticket, keys)
    is_for_us = (ticket.group_id, ticket.epoch, ticket.importer) == (
        exporter,
        epoch,
        request.importer,
    )
    if not is_for_us or ticket.num_blocks != grant.num_blocks:
        raise TransferFailed("the ticket does not fit its lease")
    if ticket.hashes != request.hashes[: grant.num_blocks * HASH_BYTES]:
        raise TransferFailed("the ticket is for other blocks than were asked for")
    return Lease(exporter, epoch, grant)


def give_back(lease: Lease, importer: GroupId, keys: TransferKeys, *, timeout_s: float) -> None:
    """Tell the exporter that no rank reads under this lease any more. Raises TransferFailed.

    Without it, as when a rank has not answered, the lease ends by itself.
    """
    name = RankName(lease.exporter, lease.epoch, 0)
    address = lease.grant.ranks[0].address
    with _connected(address, name, keys, Deadline(timeout_s)) as (_, connection):
        connection.send(ReleaseLease(importer, lease.grant.ticket))
        connection.receive_only(Released)


def fetch_blocks(
    lease: Lease,
    into: HostSlots,
    slots: Sequence[int],
    *,
    importer: GroupId,
    rank: int,
    keys: TransferKeys,
    timeout_s: float,
    max_bytes: int,
    transport: Transport | None = None,
) -> FetchReport:
    """Fetch this rank's heads of all blocks of the lease into these slots, in their order.

    When it returns, every byte has been checked. When it raises TransferFailed, the slots hold
    anything, and nothing writes to them any more. The slots must be nobody else's meanwhile.
    """
    num_blocks = lease.grant.num_blocks
    assert len(set(slots)) == len(slots) == num_blocks, "a slot of its own for every block"
    num_bytes = num_blocks * len(into.heads) * into.layout.piece_bytes
    if num_bytes > max_bytes:
        raise TransferFailed(f"{num_bytes} bytes to fetch; at most {max_bytes} are allowed")
    started_s = time.perf_counter()
    shares = divide_heads(into.heads, lease.grant.ranks, rank)
    fetch = _Fetch(
        lease=lease,
        into=into,
        slots=np.array(slots, np.intp),
        importer=importer,
        keys=keys,
        transport=SocketTransport() if transport is None else transport,
        deadline=Deadline(min(timeout_s, lease.grant.valid_s)),
    )
    fetch.run(shares)
    return FetchReport(num_bytes, time.perf_counter() - started_s)


class _Fetch:
    """One rank's part of a lease, from several ranks at the same time."""

    def __init__(
        self,
        *,
        lease: Lease,
        into: HostSlots,
        slots: NDArray[np.intp],
        importer: GroupId,
        keys: TransferKeys,
        transport: Transport,
        deadline: Deadline,
    ) -> None:
        self._lease = lease
        self._into = into
        self._slots = slots
        self._importer = importer
        self._keys = keys
        self._transport = transport
        self._deadline = deadline
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_cut = False

    def run(self, shares: dict[int, list[int]]) -> None:
        """Fetch each share from its rank. Raises the first failure, when all have ended."""
        if len(shares) == 1:
            self._fetch_from(*shares.popitem())
            return
        with ThreadPoolExecutor(len(shares), thread_name_prefix="block-fetch") as pool:
            futures = [pool.submit(self._fetch_from, *share) for share in shares.items()]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._cut()
                raise

    def _fetch_from(self, source_rank: int, heads: list[int]) -> None:
        source = self._lease.grant.ranks[source_rank]
        name = RankName(self._lease.exporter, self._lease.epoch, source_rank)
        try:
            with (
                _connected(source.address, name, self._keys, self._deadline) as (peer, connection),
                self._cuttable(peer),
            ):
                self._fetch_over(connection, heads)
        except TransferFailed as failure:
            raise TransferFailed(
                f"rank {source_rank} of {name.group_id} at {source.address}: {failure}"
            ) from failure

    def _fetch_over(self, connection: Connection, heads: list[int]) -> None:
        piece_bytes = self._into.layout.piece_bytes
        num_blocks = len(self._slots)
        request = FetchPieces(
            importer=self._importer,
            ticket=self._lease.grant.ticket,
            transport=self._transport.name,
            piece_bytes=piece_bytes,
            heads=tuple(heads),
        )
        memory = np.empty(min(num_blocks, blocks_per_run(piece_bytes)) * piece_bytes, np.uint8)
        with self._transport.receiving(connection) as receiver:
            connection.send(request)
            for run in runs(num_blocks, heads, piece_bytes):
                received = memory[: run.num_blocks * piece_bytes]
                expected = receiver.receive_into(received.data)
                if not is_mac(digest([received.data]), expected):
                    raise TransferFailed("blocks are not what the exporter's digest says")
                self._into.write(self._slots[run.blocks], run.head, received)

    @contextlib.contextmanager
    def _cuttable(self, peer: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._is_cut:
                raise TransferFailed("another rank has failed")
            self._open.add(peer)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(peer)

    def _cut(self) -> None:
        """Let the other threads fail at once: what they fetch is of no use any more."""
        with self._lock:
            self._is_cut = True
            for peer in self._open:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _connected(
    address: str, name: RankName, keys: TransferKeys, deadline: Deadline
) -> Iterator[tuple[socket.socket, Connection]]:
    """A connection to the rank of that name, and to no other."""
    try:
        parsed = Address.parse(address)
    except ConfigError as error:
        raise TransferFailed(str(error)) from error
    with parsed.connect(deadline) as peer:
        stream = TimedStream(peer, deadline)
        yield peer, Connection(stream, greet(stream, keys, name))
