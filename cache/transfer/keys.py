"""Keys of the transfers, from the secret that a fleet shares.

Each purpose has a key of its own, so that nothing made for one can be passed off as another's:
HKDF-Expand (RFC 5869) with HMAC-SHA256. The secret is uniformly random already, so there is nothing
to extract.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

SECRET_BYTES = 32
HASH = "sha256"
MAC_BYTES = 32

_LABEL = b"forebay transfer 1 "
_FIRST_BLOCK = b"\x01"


@dataclass(frozen=True, slots=True)
class TransferKeys:
    """What a rank needs of the secret; it is never printed."""

    handshake: bytes = field(repr=False)
    session: bytes = field(repr=False)
    ticket: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> TransferKeys:
        """`secret`: SECRET_BYTES random bytes, the same in the whole fleet."""
        assert len(secret) == SECRET_BYTES, "a secret of another length is not ours"
        return cls(*(_expand(secret, purpose) for purpose in (b"handshake", b"session", b"ticket")))


def mac(key: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    """HMAC-SHA256 over the parts one after the other; who calls makes that unambiguous."""
    return hmac.digest(key, b"".join(parts), HASH)


def is_mac(expected: bytes, got: bytes | bytearray | memoryview) -> bool:
    """Whether they are equal, in a time that tells nothing about where they differ."""
    return hmac.compare_digest(expected, got)


def _expand(secret: bytes, purpose: bytes) -> bytes:
    return mac(secret, _LABEL, purpose, _FIRST_BLOCK)
