"""The exporting side: one rank's server, which gives head pieces out of its host slots.

A few threads each accept a connection, authenticate the peer, answer its one request and close. A
connection waits in the system's queue while all of them are busy, so their number bounds what is
open. Nearly all of a thread's time goes by in system calls, copies and hashing, none of which holds
Python's global lock: the rank's main thread goes on computing.

A run is copied out of the slots before it is hashed and sent, and the ticket's time is checked
after the copy: what the slots held when their time was over, or later, never leaves the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import structlog

from cache.transfer.addresses import LOOPBACK, Address
from cache.transfer.connection import Connection
from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed
from cache.transfer.handshake import RankName, welcome
from cache.transfer.keys import TransferKeys
from cache.transfer.lending import Lender, Loan
from cache.transfer.messages import (
    HASH_BYTES,
    FetchPieces,
    LeaseGranted,
    LeaseRequest,
    Refused,
    Released,
    ReleaseLease,
)
from cache.transfer.planning import runs
from cache.transfer.slots import HostSlots, digest
from cache.transfer.stream import TimedStream
from cache.transfer.ticket import Ticket, TicketOffice
from cache.transfer.transport import SocketTransport, Transport

_LAST_MOMENT_S = 1.0
_ACCEPT_PAUSE_S = 0.1
"""After a failure to accept: for want of descriptors, as a rule, which somebody will close."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one server.

    `num_threads` connections are served at a time, and as many wait; of these threads at most half
    wait for the engine. A peer has `handshake_s` to authenticate itself, the engine `lend_s` to
    answer, and a peer `send_s` to take what it asked for, or less if its ticket ends before.
    """

    num_threads: int = 8
    handshake_s: float = 2.0
    lend_s: float = 5.0
    send_s: float = 10.0


class BlockServer:
    """Serves from its construction until `close`. Only rank 0 has a `lender`.

    Raises ConfigError for an address that cannot be used, and OSError if it is taken.
    """

    def __init__(
        self,
        name: RankName,
        slots: HostSlots,
        keys: TransferKeys,
        *,
        address: str = LOOPBACK,
        lender: Lender | None = None,
        transport: Transport | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._name = name
        self._slots = slots
        self._keys = keys
        self._tickets = TicketOffice(keys, name.group_id, name.epoch)
        self._lender = lender
        self._transport = SocketTransport() if transport is None else transport
        self._limits = ServerLimits() if limits is None else limits
        self._log = structlog.get_logger(__name__).bind(rank=name.rank)
        self._lending_places = threading.Semaphore(max(1, self._limits.num_threads // 2))
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._asked: set[Future[Loan | None]] = set()
        self._listener, self._address = Address.parse(address).listen(self._limits.num_threads)
        self._threads = [
            threading.Thread(target=self._work, name=f"block-server-{i}", daemon=True)
            for i in range(self._limits.num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        """Where peers reach it."""
        return str(self._address)

    def close(self) -> None:
        """Cut all connections and end all threads; returns when they have ended."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        # Wakes the threads that wait in accept; closing the socket alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
            for future in self._asked:
                future.cancel()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        if self._address.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address.path)

    def __enter__(self) -> BlockServer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                connected, _ = self._listener.accept()
            except OSError:
                self._stopped.wait(_ACCEPT_PAUSE_S)
                continue
            with connected:
                try:
                    with self._tracked(connected):
                        self._serve(connected)
                except TransferFailed as failure:
                    self._log.info("transfer_not_served", reason=str(failure))
                except Exception:
                    self._log.exception("transfer_server_failed")

    @contextlib.contextmanager
    def _tracked(self, connected: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._stopped.is_set():
                raise TransferFailed("the server has stopped")
            self._open.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connected)

    def _serve(self, connected: socket.socket) -> None:
        stream = TimedStream(connected, Deadline(self._limits.handshake_s))
        connection = Connection(stream, welcome(stream, self._keys, self._name))
        request = connection.receive()
        stream.deadline = Deadline(self._limits.send_s)
        try:
            match request:
                case FetchPieces():
                    self._send_pieces(connection, request)
                case LeaseRequest():
                    self._lend(connection, request)
                case ReleaseLease():
                    self._release(connection, request)
                case _:
                    raise TransferFailed(f"a {type(request).__name__} is no request")
        except TransferFailed as failure:
            if not stream.is_broken:
                stream.deadline = Deadline(self._limits.handshake_s)
                connection.send(Refused(str(failure)))
            raise

    def _send_pieces(self, connection: Connection, request: FetchPieces) -> None:
        ticket = self._tickets.check(request.ticket, request.importer)
        self._check_request(request, ticket)
        remaining_s = self._tickets.remaining_s(ticket)
        connection.stream.deadline = Deadline(min(self._limits.send_s, remaining_s))
        slots = np.array(ticket.slots, np.intp)
        with self._transport.sending(connection) as sender:
            for run in runs(ticket.num_blocks, request.heads, request.piece_bytes):
                parts = self._slots.read(slots[run.blocks], run.head)
                self._tickets.remaining_s(ticket)  # raises if it ended while we copied
                sender.send(digest(parts), parts)

    def _check_request(self, request: FetchPieces, ticket: Ticket) -> None:
        if request.transport != self._transport.name:
            raise TransferFailed(f"blocks leave here by {self._transport.name} only")
        if request.piece_bytes != self._slots.layout.piece_bytes:
            raise TransferFailed(f"a head piece has {self._slots.layout.piece_bytes} bytes here")
        if len(set(request.heads)) < len(request.heads):
            raise TransferFailed("a head is asked for twice")
        if not set(request.heads) <= set(self._slots.heads):
            raise TransferFailed(f"rank {self._name.rank} has no other heads than its own")
        if max(ticket.slots) >= self._slots.num_slots:
            raise TransferFailed("the ticket names slots that are not there")

    def _lend(self, connection: Connection, request: LeaseRequest) -> None:
        if self._lender is None:
            raise TransferFailed("rank 0 is the one to ask")
        if not self._lending_places.acquire(blocking=False):
            raise TransferFailed("too many others are asking")
        try:
            loan = self._await_loan(self._lender.lend(request))
        finally:
            self._lending_places.release()
        if loan is None:
            raise TransferFailed("none of these blocks is here")
        try:
            connection.send(self._grant(request, loan))
        except TransferFailed:
            self._lender.release(loan.lease_id)  # it will not be used
            raise

    def _await_loan(self, future: Future[Loan | None]) -> Loan | None:
        with self._lock:
            self._asked.add(future)
            if self._stopped.is_set():
                future.cancel()
        try:
            return future.result(self._limits.lend_s)
        except TimeoutError:
            if future.cancel():
                raise TransferFailed("the engine has no time to answer") from None
            return future.result(_LAST_MOMENT_S)  # it is being answered right now
        except CancelledError:
            raise TransferFailed("the server stops") from None
        finally:
            with self._lock:
                self._asked.discard(future)

    def _grant(self, request: LeaseRequest, loan: Loan) -> LeaseGranted:
        num_blocks = len(loan.slots)
        ticket = self._tickets.write(
            loan.lease_id,
            request.importer,
            loan.slots,
            request.hashes[: num_blocks * HASH_BYTES],
            loan.end_s,
        )
        valid_s = self._tickets.remaining_s(self._tickets.check(ticket, request.importer))
        return LeaseGranted(ticket, num_blocks, valid_s, loan.ranks)

    def _release(self, connection: Connection, request: ReleaseLease) -> None:
        ticket = self._tickets.check(request.ticket, request.importer)
        if self._lender is None:
            raise TransferFailed("rank 0 is the one to tell")
        self._lender.release(ticket.lease_id)
        connection.send(Released())
