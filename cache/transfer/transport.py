"""How the bytes of runs come from one rank's memory into another's: the seam of the transfers.

Whatever the transport, peers meet over a connection of ours, which authenticates them, carries the
requests, and says what each run must hash to. `SocketTransport` sends the bytes there too.
Another transport may move them by its own means; what arrives is checked in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Protocol

from cache.transfer.connection import Connection
from cache.transfer.messages import RunAhead


class RunSender(Protocol):
    """The exporter's side of one request."""

    def send(self, digest: bytes, parts: Sequence[memoryview]) -> None:
        """Send the next run. `parts` belong to the caller again afterwards."""


class RunReceiver(Protocol):
    """The importer's side of one request."""

    def receive_into(self, memory: memoryview) -> bytes:
        """Fill `memory`, which nobody else can write to; returns what it must hash to."""


class Transport(Protocol):
    """A way for bytes. All methods, and those of what they return, may raise TransferFailed.

    One object serves all threads of a rank, those that export and those that import.
    """

    name: ClassVar[str]

    def sending(self, connection: Connection) -> AbstractContextManager[RunSender]:
        """To answer the request that came over `connection`. Its end waits until all is taken."""

    def receiving(self, connection: Connection) -> AbstractContextManager[RunReceiver]:
        """To receive what will be asked for over `connection`.

        It is entered before anything is asked for: who waits for room to receive into must not
        keep an exporter's room to send from.
        """


class SocketTransport:
    """The bytes follow their message over the connection: TCP or a Unix socket."""

    name: ClassVar[str] = "socket"

    def sending(self, connection: Connection) -> AbstractContextManager[RunSender]:
        """See `Transport`."""
        return nullcontext(_SocketRuns(connection))

    def receiving(self, connection: Connection) -> AbstractContextManager[RunReceiver]:
        """See `Transport`."""
        return nullcontext(_SocketRuns(connection))


class _SocketRuns:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, digest: bytes, parts: Sequence[memoryview]) -> None:
        self._connection.send(RunAhead(digest), parts)

    def receive_into(self, memory: memoryview) -> bytes:
        ahead = self._connection.receive_only(RunAhead)
        self._connection.stream.receive_into(memory)
        return ahead.digest
