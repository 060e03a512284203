"""Two ends of one authenticated connection within a process, and what an attacker sees of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cache.transfer.connection import Connection
from cache.transfer.deadline import Deadline
from cache.transfer.handshake import RankName, greet, welcome
from cache.transfer.keys import TransferKeys
from cache.transfer.stream import TimedStream
from support.transfer_groups import EPOCH, EXPORTER, KEYS

NAME = RankName(EXPORTER, EPOCH, 0)
_TIMEOUT_S = 2.0


@dataclass
class Session:
    """`client_socket` and `server_socket` are what the connections use."""

    client: Connection
    server: Connection
    client_socket: socket.socket
    server_socket: socket.socket


@contextlib.contextmanager
def session(
    *,
    client_keys: TransferKeys = KEYS,
    server_keys: TransferKeys = KEYS,
    meant: RankName = NAME,
    timeout_s: float = _TIMEOUT_S,
) -> Iterator[Session]:
    """Both ends, after the handshake. Raises TransferFailed if the client's side of it fails."""
    a, b = socket.socketpair()
    with a, b, ThreadPoolExecutor(1) as pool:
        streams = [TimedStream(end, Deadline(timeout_s)) for end in (a, b)]
        welcomed = pool.submit(welcome, streams[1], server_keys, NAME)
        try:
            client = Connection(streams[0], greet(streams[0], client_keys, meant))
        except BaseException:
            a.close()
            welcomed.exception()
            raise
        yield Session(client, Connection(streams[1], welcomed.result()), a, b)
