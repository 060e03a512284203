"""Two ranks prove to each other that they know the fleet's secret, and agree on session keys.

    client -> server    protocol | client's nonce
    server -> client    server's nonce | MAC(handshake key, "server" | transcript)
    client -> server    MAC(handshake key, "client" | transcript)

    transcript = protocol | length of the server's name | server's name | both nonces

This is the three-pass mutual authentication of ISO/IEC 9798-4, in the form whose security Bellare
and Rogaway have proved ("Entity Authentication and Key Distribution", CRYPTO '93): both nonces and
the prover's role are under each MAC, so a proof can be neither reflected nor used a second time.
Session keys are MACs over the same transcript under another key, one for each direction.

The server's name is not sent: each side puts in what it believes. A client that has reached
another rank, group or epoch than it meant (a port can be taken over) fails at the server's proof.
All messages have fixed lengths, and nothing is parsed before both proofs are good.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cache.transfer.failures import TransferFailed
from cache.transfer.keys import MAC_BYTES, TransferKeys, is_mac, mac
from cache.transfer.stream import TimedStream
from wire.ids import GroupId

PROTOCOL = b"FBTRANS\x01"
NONCE_BYTES = 32

_CLIENT, _SERVER = b"client", b"server"


@dataclass(frozen=True, slots=True)
class RankName:
    """One rank in one life of its group."""

    group_id: GroupId
    epoch: int
    rank: int

    def __bytes__(self) -> bytes:
        return f"{self.group_id}/{self.epoch}/{self.rank}".encode()


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """One key for each direction, from where one side stands."""

    sending: bytes
    receiving: bytes


def greet(stream: TimedStream, keys: TransferKeys, server: RankName) -> SessionKeys:
    """The client's side. Raises TransferFailed unless `server` is at the other end."""
    client_nonce = secrets.token_bytes(NONCE_BYTES)
    stream.send([PROTOCOL, client_nonce])
    answer = stream.receive(NONCE_BYTES + MAC_BYTES)
    transcript = _transcript(server, client_nonce, answer[:NONCE_BYTES])
    if not is_mac(mac(keys.handshake, _SERVER, transcript), answer[NONCE_BYTES:]):
        raise TransferFailed("the other side is not the rank that was meant, or has another secret")
    stream.send([mac(keys.handshake, _CLIENT, transcript)])
    to_server, to_client = _directions(keys, transcript)
    return SessionKeys(sending=to_server, receiving=to_client)


def welcome(stream: TimedStream, keys: TransferKeys, server: RankName) -> SessionKeys:
    """The side of `server`. Raises TransferFailed unless the client knows the secret."""
    hello = stream.receive(len(PROTOCOL) + NONCE_BYTES)
    if not hello.startswith(PROTOCOL):
        raise TransferFailed("the other side speaks another protocol")
    server_nonce = secrets.token_bytes(NONCE_BYTES)
    transcript = _transcript(server, hello[len(PROTOCOL) :], server_nonce)
    stream.send([server_nonce, mac(keys.handshake, _SERVER, transcript)])
    if not is_mac(mac(keys.handshake, _CLIENT, transcript), stream.receive(MAC_BYTES)):
        raise TransferFailed("the other side has another secret, or meant another rank")
    to_server, to_client = _directions(keys, transcript)
    return SessionKeys(sending=to_client, receiving=to_server)


def _transcript(
    server: RankName, client_nonce: bytes | bytearray, server_nonce: bytes | bytearray
) -> bytes:
    name = bytes(server)
    return b"".join([PROTOCOL, len(name).to_bytes(4, "big"), name, client_nonce, server_nonce])


def _directions(keys: TransferKeys, transcript: bytes) -> tuple[bytes, bytes]:
    return mac(keys.session, _CLIENT, transcript), mac(keys.session, _SERVER, transcript)
