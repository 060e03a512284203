"""Groups that lend and fetch blocks, within one process: real servers over made-up blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.transfer.client import FetchReport, Lease, borrow, fetch_blocks
from cache.transfer.handshake import RankName
from cache.transfer.keys import TransferKeys
from cache.transfer.lending import Loan
from cache.transfer.messages import HASH_BYTES, LeaseRequest, RankSource
from cache.transfer.server import BlockServer, ServerLimits
from cache.transfer.slots import BlockLayout, HostSlots
from cache.transfer.transport import Transport
from wire.ids import GroupId

KEYS = TransferKeys.derive(bytes(range(32)))
EXPORTER, IMPORTER = GroupId("lender"), GroupId("borrower")
EPOCH = 7
NUM_BLOCKS = 5
NUM_HEADS = 3
NUM_SLOTS = 16
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 30

LAYOUT = BlockLayout(num_sides=4, element_bytes=96, scale_bytes=6)

SHARDS = {
    1: (range(0, 3),),
    2: (range(0, 2), range(1, 3)),  # head 1 lies between two ranks, on both
    3: (range(0, 1), range(1, 2), range(2, 3)),
    5: (range(0, 1), range(0, 1), range(1, 2), range(1, 3), range(2, 3)),  # more ranks than heads
}
"""How three key/value heads are dealt out."""


def make_pieces(layout: BlockLayout = LAYOUT, num_blocks: int = NUM_BLOCKS) -> NDArray[np.uint8]:
    """(num_blocks, NUM_HEADS, piece_bytes) random bytes."""
    shape = (num_blocks, NUM_HEADS, layout.piece_bytes)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def make_hashes(num_blocks: int = NUM_BLOCKS) -> bytes:
    return b"".join(i.to_bytes(HASH_BYTES, "big") for i in range(1, num_blocks + 1))


def block_of(pieces: NDArray[np.uint8], heads: range, layout: BlockLayout) -> bytes:
    """A block as a rank with these heads stores it, from its (NUM_HEADS, piece_bytes)."""
    elements, scales = b"", b""
    for side in range(layout.num_sides):
        for head in heads:
            start = side * layout.element_bytes
            elements += pieces[head, start : start + layout.element_bytes].tobytes()
            start = layout.num_sides * layout.element_bytes + side * layout.scale_bytes
            scales += pieces[head, start : start + layout.scale_bytes].tobytes()
    return (elements + scales).ljust(block_bytes(layout, heads), b"\0")


def block_bytes(layout: BlockLayout, heads: range) -> int:
    """With some padding."""
    return len(heads) * layout.piece_bytes + 24


def empty_slots(
    heads: range, layout: BlockLayout = LAYOUT, num_slots: int = NUM_SLOTS
) -> tuple[HostSlots, NDArray[np.uint8]]:
    """A rank's slots, and the memory that they are."""
    memory = np.zeros((num_slots, block_bytes(layout, heads)), np.uint8)
    return HostSlots(memory, layout, heads), memory


def filled_slots(
    heads: range, pieces: NDArray[np.uint8], slots: Sequence[int], layout: BlockLayout = LAYOUT
) -> tuple[HostSlots, NDArray[np.uint8]]:
    held, memory = empty_slots(heads, layout, max(NUM_SLOTS, max(slots) + 1))
    for slot, block in zip(slots, pieces, strict=True):
        memory[slot] = np.frombuffer(block_of(block, heads, layout), np.uint8)
    return held, memory


@dataclass
class ReadyLender:
    """Answers every request at once with the same loan, as long as it is to last."""

    slots: tuple[int, ...]
    valid_s: float = 30.0
    ranks: tuple[RankSource, ...] = ()
    requests: list[LeaseRequest] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def lend(self, request: LeaseRequest) -> Future[Loan | None]:
        self.requests.append(request)
        future: Future[Loan | None] = Future()
        num_blocks = min(len(self.slots), len(request.hashes) // HASH_BYTES)
        end_s = time.monotonic() + self.valid_s
        future.set_result(Loan(11, self.slots[:num_blocks], end_s, self.ranks))
        return future

    def release(self, lease_id: int) -> None:
        self.released.append(lease_id)


@dataclass
class Exporter:
    """A group that lends."""

    servers: list[BlockServer]
    memories: list[NDArray[np.uint8]]
    lender: ReadyLender
    pieces: NDArray[np.uint8]

    def borrow(self, num_blocks: int | None = None) -> Lease:
        hashes = make_hashes(len(self.pieces) if num_blocks is None else num_blocks)
        return borrow(
            self.servers[0].address,
            EXPORTER,
            EPOCH,
            LeaseRequest(IMPORTER, "format", hashes),
            KEYS,
            timeout_s=TIMEOUT_S,
        )


@contextlib.contextmanager
def exporting(
    shards: Sequence[range],
    *,
    addresses: Sequence[str] | None = None,
    layout: BlockLayout = LAYOUT,
    num_blocks: int = NUM_BLOCKS,
    limits: ServerLimits | None = None,
    transport: Transport | None = None,
) -> Iterator[Exporter]:
    """A group of one rank per shard, all in this process."""
    slots = tuple((5 * i + 3) % max(NUM_SLOTS, num_blocks + 1) for i in range(num_blocks))
    pieces = make_pieces(layout, num_blocks)
    lender = ReadyLender(slots)
    servers: list[BlockServer] = []
    memories = []
    with contextlib.ExitStack() as stack:
        for rank, heads in enumerate(shards):
            held, memory = filled_slots(heads, pieces, slots, layout)
            memories.append(memory)
            servers.append(
                stack.enter_context(
                    BlockServer(
                        RankName(EXPORTER, EPOCH, rank),
                        held,
                        KEYS,
                        address="127.0.0.1:0" if addresses is None else addresses[rank],
                        lender=lender if rank == 0 else None,
                        transport=transport,
                        limits=limits,
                    )
                )
            )
        lender.ranks = tuple(
            RankSource(server.address, heads.start, len(heads))
            for server, heads in zip(servers, shards, strict=True)
        )
        yield Exporter(servers, memories, lender, pieces)


def fetch(
    lease: Lease,
    into: HostSlots,
    slots: Sequence[int],
    *,
    rank: int = 0,
    importer: GroupId = IMPORTER,
    keys: TransferKeys = KEYS,
    timeout_s: float = TIMEOUT_S,
    max_bytes: int = MAX_BYTES,
    transport: Transport | None = None,
) -> FetchReport:
    """`fetch_blocks` with what most tests have in common."""
    return fetch_blocks(
        lease,
        into,
        slots,
        importer=importer,
        rank=rank,
        keys=keys,
        timeout_s=timeout_s,
        max_bytes=max_bytes,
        transport=transport,
    )


def import_on_all_ranks(
    lease: Lease,
    shards: Sequence[range],
    *,
    layout: BlockLayout = LAYOUT,
    transport: Transport | None = None,
) -> list[NDArray[np.uint8]]:
    """Fetch as a group of one rank per shard; each rank's blocks, in the order of the lease."""
    num_blocks = lease.grant.num_blocks
    slots = [num_blocks - i for i in range(num_blocks)]

    def import_as(rank: int) -> NDArray[np.uint8]:
        into, memory = empty_slots(shards[rank], layout, num_blocks + 1)
        fetch(lease, into, slots, rank=rank, transport=transport)
        return memory[slots]

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(import_as, range(len(shards))))
