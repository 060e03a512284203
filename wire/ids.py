"""Names of the things that cross process boundaries, as types of their own."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, NewType, TypeAlias

RequestId = NewType("RequestId", str)
GroupId = NewType("GroupId", str)
BatchId = NewType("BatchId", str)
BlockHash = NewType("BlockHash", bytes)

if TYPE_CHECKING:
    TokenIds: TypeAlias = array[int]
else:
    # array.array takes no type argument at run time before Python 3.12.
    TokenIds = array
"""Token ids as unsigned 32-bit integers: 4 bytes each in memory and on the wire."""

_UINT32 = "I"
assert array(_UINT32).itemsize == 4


def token_ids(ids: Iterable[int] = ()) -> TokenIds:
    """Pack `ids`. Raises OverflowError or TypeError for what is not an unsigned 32-bit integer."""
    return array(_UINT32, ids)


def token_ids_to_bytes(ids: TokenIds) -> bytes:
    """Little-endian uint32, 4 bytes a token."""
    return _little_endian(ids).tobytes()


def token_ids_from_bytes(data: bytes) -> TokenIds:
    """The inverse of `token_ids_to_bytes`. Raises ValueError for a length not divisible by 4."""
    ids = array(_UINT32)
    ids.frombytes(data)
    return _little_endian(ids)


def _little_endian(ids: TokenIds) -> TokenIds:
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids
