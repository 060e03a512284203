"""What two ranks say to each other once each knows the other.

    importer's rank 0 -> exporter's rank 0      LeaseRequest     answer: LeaseGranted or Refused
                                                ReleaseLease     answer: Released
    any importing rank -> any exporting rank    FetchPieces      answer: the runs, or Refused

    runs, each a RunAhead with its bytes behind it; or, where another transport carries the bytes,
    each a RunPlaced that says where they lie, answered by RunTaken

A connection carries one request. Its answer may be Refused at any point, and then it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from wire.errors import WireError
from wire.ids import GroupId

HASH_BYTES = 16
DIGEST_BYTES = 32
MAX_RANKS = 256
MAX_HEADS = 4096


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Which of these blocks can be had? They follow each other in one chain.

    `hashes`: HASH_BYTES each, one after the other. `cache_format` names the weights and all that
    changes a block's bytes.
    """

    importer: GroupId
    cache_format: str
    hashes: bytes

    def __post_init__(self) -> None:
        """Raise WireError unless there are whole hashes."""
        if not self.hashes or len(self.hashes) % HASH_BYTES:
            raise WireError(f"{len(self.hashes)} bytes are no list of hashes")


@dataclass(frozen=True, slots=True)
class RankSource:
    """Where an exporting rank listens, and which of the model's key/value heads it holds."""

    address: str
    first_head: int
    num_heads: int

    def __post_init__(self) -> None:
        """Raise WireError for heads that no model has."""
        if self.first_head < 0 or not 0 < self.num_heads <= MAX_HEADS:
            raise WireError(f"a rank cannot have {self.num_heads} heads from {self.first_head} on")

    @property
    def heads(self) -> range:
        """Its key/value heads, counted in the whole model."""
        return range(self.first_head, self.first_head + self.num_heads)


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The first `num_blocks` of the blocks asked for lie still for `valid_s` from now.

    `ranks` are the exporting ranks, in order.
    """

    ticket: bytes
    num_blocks: int
    valid_s: float
    ranks: tuple[RankSource, ...]

    def __post_init__(self) -> None:
        """Raise WireError for a lease of nothing, or from nobody."""
        if self.num_blocks < 1 or not 0 < len(self.ranks) <= MAX_RANKS:
            raise WireError(f"a lease of {self.num_blocks} blocks from {len(self.ranks)} ranks")


@dataclass(frozen=True, slots=True)
class Refused:
    """No, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """No rank of the importer reads under this ticket any more."""

    importer: GroupId
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Released:
    """The exporter has been told."""


@dataclass(frozen=True, slots=True)
class FetchPieces:
    """Send these heads of all blocks of the ticket, run by run, as `planning.runs` orders them.

    `piece_bytes` is what the importer takes a head piece to have.
    """

    importer: GroupId
    ticket: bytes
    transport: str
    piece_bytes: int
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise WireError for more heads than any model has."""
        if not 0 < len(self.heads) <= MAX_HEADS:
            raise WireError(f"{len(self.heads)} heads cannot be fetched at once")


@dataclass(frozen=True, slots=True)
class RunAhead:
    """The bytes of the next run come right behind this; `digest` is their SHA-256."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class RunPlaced:
    """The bytes of the next run lie at `address` of the peer that a transport calls `place`."""

    digest: bytes
    place: str
    address: int

    def __post_init__(self) -> None:
        """Raise WireError for what is no address."""
        if not 0 < self.address < 2**64:
            raise WireError(f"{self.address} is no address in memory")


@dataclass(frozen=True, slots=True)
class RunTaken:
    """The run has been read, or never will be."""


Message: TypeAlias = (
    LeaseRequest
    | LeaseGranted
    | Refused
    | ReleaseLease
    | Released
    | FetchPieces
    | RunAhead
    | RunPlaced
    | RunTaken
)

KINDS: dict[int, type[Message]] = {
    1: LeaseRequest,
    2: LeaseGranted,
    3: Refused,
    4: ReleaseLease,
    5: Released,
    6: FetchPieces,
    7: RunAhead,
    8: RunPlaced,
    9: RunTaken,
}
KIND_OF = {message_type: kind for kind, message_type in KINDS.items()}
