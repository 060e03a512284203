"""Authenticated messages, and bulk bytes between them, over one connection.

A frame is

    length of the body: uint32, big-endian | kind: uint8 | body: msgpack, see `wire.codec` | MAC

    MAC = HMAC-SHA256(key of this direction, number of the frame: uint64 | all before it)

The number is not sent: both sides count. A frame that is changed, left out, repeated, out of order
or from another session has another MAC, and ends the connection. The length is checked before
anything is reserved for the body, and the MAC before anything in it is looked at.

Bulk bytes have no frame. The message before them carries their digest, and how many they are both
sides know from what was asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar, cast

from cache.transfer.failures import TransferFailed
from cache.transfer.handshake import SessionKeys
from cache.transfer.keys import MAC_BYTES, is_mac, mac
from cache.transfer.messages import KIND_OF, KINDS, Message, Refused
from cache.transfer.stream import TimedStream
from wire.codec import decode, encode
from wire.errors import InvalidRequest, WireError

MAX_BODY_BYTES = 1024 * 1024
"""A ticket for 50,000 blocks."""

_HEADER = struct.Struct(">IB")
_NUMBER = struct.Struct(">Q")

M = TypeVar("M", bound=Message)


class Connection:
    """One side's end, after the handshake. All methods raise TransferFailed."""

    def __init__(self, stream: TimedStream, keys: SessionKeys) -> None:
        self.stream = stream
        self._keys = keys
        self._num_sent = 0
        self._num_received = 0

    def send(self, message: Message, bulk: Sequence[memoryview] = ()) -> None:
        """Send a message, and the bulk bytes that it announces."""
        body = encode(message)
        if len(body) > MAX_BODY_BYTES:
            raise TransferFailed(f"a {type(message).__name__} of {len(body)} bytes is too long")
        frame = _HEADER.pack(len(body), KIND_OF[type(message)]) + body
        number = _NUMBER.pack(self._num_sent)
        self._num_sent += 1
        self.stream.send([frame, mac(self._keys.sending, number, frame), *bulk])

    def receive(self) -> Message:
        """The next message, of whatever kind."""
        header = self.stream.receive(_HEADER.size)
        num_bytes, kind = _HEADER.unpack(header)
        if num_bytes > MAX_BODY_BYTES:
            raise TransferFailed(f"a frame announces {num_bytes} bytes, above {MAX_BODY_BYTES}")
        body = self.stream.receive(num_bytes)
        number = _NUMBER.pack(self._num_received)
        self._num_received += 1
        expected = mac(self._keys.receiving, number, header, body)
        if not is_mac(expected, self.stream.receive(MAC_BYTES)):
            raise TransferFailed("a frame is not what the other side sent")
        message_type = KINDS.get(kind)
        if message_type is None:
            raise TransferFailed(f"unknown kind of frame: {kind}")
        try:
            return decode(message_type, bytes(body))
        except (WireError, InvalidRequest) as error:
            raise TransferFailed(str(error)) from error

    def receive_only(self, message_type: type[M]) -> M:
        """The next message, which must be of this type; a refusal is raised."""
        message = self.receive()
        if isinstance(message, Refused):
            raise TransferFailed(f"refused: {message.reason}")
        if type(message) is not message_type:
            raise TransferFailed(f"a {type(message).__name__} instead of {message_type.__name__}")
        return cast("M", message)
