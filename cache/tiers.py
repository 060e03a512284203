"""The prefix cache over two memories: blocks on the device, and slots in the host's memory.

A block's contents go by their hash. They are on the device, in host memory, in both for a while,
or nowhere ("gone"). On the device sequences read and write them; in host memory they only rest:

    device ──evicted──▶ host ──evicted──▶ gone       a copy out, before the next step
    device ◀──found──── host                         a copy in, before the step that reads them

The cached blocks form a forest by prefix, and what continues a block never outlives it:

1. *Closed over both memories*: the predecessor of what is cached is cached too.
2. *Closed on the device*: the predecessor of what is on the device is on the device too, held if
   its successor is held, and evicted after it.
3. *Leaves first in host memory*: what has no place on the device is given up before its
   predecessor. It comes there in the order in which the device evicts, so both memories together
   are one list of what was used least recently.

What sequences wait for (`want`) is evicted last: the queue is the part of the future that is known.

These rules keep it so: a sequence whose full block has the contents of one already registered
changes over to that one (`register`); blocks are freed last one first; what is found in host
memory is brought back whole, behind its predecessors (`hold`); what is evicted from the device
always finds a slot if anything that continues it has one; and a block is forgotten with all that
continue it (`forget`). Once a block is full and named, nobody writes to it any more, so blocks are
shared without being copied.

A step's plan makes its copies out first, then its copies in, then computes. What may be
overwritten when is kept sound by four rules:

4. A slot from which a plan copies in is held until that plan is taken: no copy out of the same
   plan can go there.
5. A slot is the target of one copy out in a plan at most: if it is given up in the plan that would
   have filled it, the copy of what comes next takes the place of the first.
6. A block that a plan copies in is held by the sequence that needs it: the same plan can neither
   evict it nor copy it in twice.
7. Contents that were just evicted may come back in the same plan: copies out precede copies in.

Groups give each other blocks through host memory: `pin` holds a prefix in slots, to be sent from
there; `reserve` gives slots to receive into, and `adopt` makes them findable.

Nothing here knows of tensors or of the time; one thread owns the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from cache.block_pool import BlockPool
from wire.ids import BlockHash

Tier: TypeAlias = Literal["device", "host", "gone"]


class BlockCopy(NamedTuple):
    """A block of the device and a slot of host memory, one to be copied to the other."""

    block_id: int
    slot: int


class Moves(NamedTuple):
    """Where contents are that were elsewhere before: hashes of 16 bytes, one after another.

    On the device, only in host memory, or in neither any more. A hash is in one of them at most.
    """

    device: bytes
    host: bytes
    gone: bytes


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """The cached beginning of a chain: its first blocks, then the slots of those after them."""

    block_ids: list[int]
    slots: list[int]

    @property
    def num_blocks(self) -> int:
        """Its length."""
        return len(self.block_ids) + len(self.slots)


class TieredCache:
    """`num_blocks` blocks of `block_size` tokens on the device, and `num_slots` in host memory."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int = 0) -> None:
        self.block_size = block_size
        self._wanted: dict[BlockHash, int] = {}  # by how many of those that wait
        self.device = BlockPool(num_blocks, self._evict, self._wanted)
        self.host = BlockPool(num_slots, self._lose, self._wanted)
        self._parents: dict[BlockHash, BlockHash | None] = {}  # of all that is cached
        self._copies_out: dict[int, int] = {}  # slot -> block, for the next plan
        self._copies_in: dict[int, int] = {}  # block -> slot, likewise
        self._were: dict[BlockHash, Tier] = {}  # where contents were before they moved

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take up."""
        return -(-num_tokens // self.block_size)

    # Sequences

    def want(self, hashes: Sequence[BlockHash]) -> None:
        """Somebody waits to use this chain: what of it is or will be cached is evicted last."""
        for block_hash in hashes:
            self._wanted[block_hash] = self._wanted.get(block_hash, 0) + 1
        self._sort(hashes)

    def unwant(self, hashes: Sequence[BlockHash]) -> None:
        """Take back a `want`."""
        for block_hash in hashes:
            self._wanted[block_hash] -= 1
            if not self._wanted[block_hash]:
                del self._wanted[block_hash]
        self._sort(hashes)

    def find_prefix(self, hashes: Sequence[BlockHash]) -> FoundPrefix:
        """What is cached of this chain's beginning; `hold` it to use it."""
        block_ids = self.device.find_all(hashes)
        if len(block_ids) == len(hashes):
            return FoundPrefix(block_ids, [])
        return FoundPrefix(block_ids, self.host.find_all(hashes[len(block_ids) :]))

    def hold(self, prefix: FoundPrefix, num_blocks: int) -> list[int]:
        """Hold a prefix just found and blocks of undefined contents behind it, `num_blocks` in all.

        There must be that many. What is in host memory comes in by the next plan.
        """
        self.device.touch(prefix.block_ids)
        self.device.prove(prefix.block_ids)
        self.host.touch(prefix.slots)  # or what is evicted now might take their place
        new = self.device.allocate(num_blocks - len(prefix.block_ids))
        assert new is not None, "whoever calls has counted the free blocks"
        for block_id, slot in zip(new, prefix.slots, strict=False):
            block_hash = self.host.name_of(slot)
            assert block_hash is not None, "it was found by its name"
            self._were.setdefault(block_hash, "host")
            self.device.name(block_id, block_hash, is_proven=True)
            self._copies_in[block_id] = slot
        return prefix.block_ids + new

    def grow(self, num_blocks: int) -> list[int] | None:
        """Hold blocks of undefined contents; None, and no change, if too few are free."""
        return self.device.allocate(num_blocks)

    def register(self, block_id: int, block_hash: BlockHash, parent: int | None) -> int:
        """Make a full, computed block findable by its contents; returns the block to use now.

        That is another one if those contents were registered before: the caller's hold moves to it
        and `block_id` is freed. `parent` is the block before it in the caller's block table, None
        for a sequence's first; behind one that was forgotten, nothing is registered.
        """
        device = self.device
        parent_hash = None if parent is None else device.name_of(parent)
        if parent is not None and parent_hash is None:
            return block_id
        existing = device.find(block_hash)
        if existing is None:
            self._were.setdefault(block_hash, self._tier(block_hash))
            slot = self.host.find(block_hash)
            device.name(block_id, block_hash, is_proven=slot is not None)
            self._parents[block_hash] = parent_hash
            if slot is not None and not self.host.is_held(slot):
                self._empty(slot)
            return block_id
        if existing != block_id:
            device.touch((existing,))
            device.prove((existing,))
            device.free((block_id,))
        return existing

    def free(self, block_table: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in the order of its block table."""
        self.device.free(block_table)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make these blocks, and all that continue them, unfindable: their contents are no good.

        Whoever holds them keeps them. This looks at all that is cached: it is for rare events.
        """
        doomed = {name for b in block_ids if (name := self.device.name_of(b)) is not None}
        behind: dict[BlockHash, list[BlockHash]] = {}
        for block_hash, parent in self._parents.items():
            if parent is not None:
                behind.setdefault(parent, []).append(block_hash)
        to_visit = list(doomed)
        while to_visit:
            further = behind.get(to_visit.pop(), [])
            doomed.update(further)
            to_visit += further
        for block_hash in doomed:
            self._were.setdefault(block_hash, self._tier(block_hash))
            del self._parents[block_hash]
            if (block_id := self.device.find(block_hash)) is not None:
                self.device.unname(block_id)
            if (slot := self.host.find(block_hash)) is not None:
                self._empty(slot)

    # Steps

    @property
    def has_copies(self) -> bool:
        """Whether copies wait for the next plan."""
        return bool(self._copies_out or self._copies_in)

    def take_copies(self) -> tuple[list[BlockCopy], list[BlockCopy]]:
        """The copies out and in that the plan now being made must have; call for every plan."""
        copies_out = [BlockCopy(block_id, slot) for slot, block_id in self._copies_out.items()]
        copies_in = [BlockCopy(block_id, slot) for block_id, slot in self._copies_in.items()]
        self._release([copy.slot for copy in copies_in])
        self._copies_out.clear()
        self._copies_in.clear()
        return copies_out, copies_in

    def take_moves(self) -> Moves | None:
        """What has moved since the last call, on the whole."""
        if not self._were:
            return None
        moved: dict[Tier, list[BlockHash]] = {"device": [], "host": [], "gone": []}
        for block_hash, was in self._were.items():
            tier = self._tier(block_hash)
            if tier != was:
                moved[tier].append(block_hash)
        self._were.clear()
        return Moves(*(b"".join(hashes) for hashes in moved.values()))

    # Other groups; to be called between steps

    def pin(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Hold slots with the cached beginning of this chain, as far as there is room for it.

        What is only on the device is copied out by the next plan: `num_ready` tells when.
        """
        prefix = self.find_prefix(hashes)
        self.host.touch(prefix.slots)
        slots: list[int] = []
        for block_hash, block_id in zip(hashes, prefix.block_ids, strict=False):
            slot = self.host.find(block_hash)
            if slot is not None:
                self.host.touch((slot,))
                slots.append(slot)
                continue
            allocated = self.host.allocate(1)
            if allocated is None:
                self._release(prefix.slots)
                return slots
            slots += allocated
            self.host.name(slots[-1], block_hash)
            self._copies_out[slots[-1]] = block_id
        return slots + prefix.slots

    def num_ready(self, slots: Sequence[int]) -> int:
        """How many of these pinned slots, from the first on, have what they are to hold.

        A slot has not before the plan that fills it was executed, nor ever again once its contents
        were found to be no good.
        """
        for i, slot in enumerate(slots):
            if slot in self._copies_out or self.host.name_of(slot) is None:
                return i
        return len(slots)

    def unpin(self, slots: Sequence[int]) -> None:
        """Let go of pinned or reserved slots, given in the order in which they were."""
        self._release(slots)

    def reserve(self, num_slots: int) -> list[int] | None:
        """Hold slots of undefined contents; None, and no change, if too few are free."""
        return self.host.allocate(num_slots)

    def adopt(self, hashes: Sequence[BlockHash], slots: Sequence[int]) -> bool:
        """Cache what was received into reserved slots, and let go of these.

        `hashes` is the chain from its beginning, whose last ones the slots hold. False if what
        precedes those is not cached (any more): they are lost then.
        """
        first = len(hashes) - len(slots)
        is_rooted = self.find_prefix(hashes[:first]).num_blocks == first
        if is_rooted:
            for i, slot in enumerate(slots, first):
                if hashes[i] not in self._parents:  # else it has come from elsewhere meanwhile
                    self._were.setdefault(hashes[i], "gone")
                    self.host.name(slot, hashes[i])
                    self._parents[hashes[i]] = hashes[i - 1] if i else None
        # All that the chain has in host memory was just used, and its last ones are to go first.
        found = map(self.host.find, hashes)
        chain = [slot for slot in found if slot is not None]
        self.host.touch(chain)
        self._release(slots)
        self._release(chain)
        return is_rooted

    # What pools and methods above have in common

    def _tier(self, block_hash: BlockHash) -> Tier:
        if self.device.find(block_hash) is not None:
            return "device"
        return "gone" if self.host.find(block_hash) is None else "host"

    def _sort(self, hashes: Sequence[BlockHash]) -> None:
        prefix = self.find_prefix(hashes)
        self.device.sort(prefix.block_ids)
        self.host.sort(prefix.slots)

    def _evict(self, block_id: int, block_hash: BlockHash) -> None:
        """The device is about to reuse a block."""
        assert block_id not in self._copies_in, "what comes in is held"
        self._were.setdefault(block_hash, "device")
        if self.host.find(block_hash) is not None:
            return  # pinned there
        slots = self.host.allocate(1)
        if slots is None:
            # Nothing that continues it is in host memory: that would have given up a slot.
            del self._parents[block_hash]
            return
        self.host.name(slots[0], block_hash, is_proven=self.device.is_proven(block_id))
        self.host.free(slots)
        self._copies_out[slots[0]] = block_id

    def _lose(self, slot: int, block_hash: BlockHash) -> None:
        """Host memory is about to reuse a slot: what is cached in one is on the device no more."""
        self._were.setdefault(block_hash, "host")
        del self._parents[block_hash]

    def _release(self, slots: Sequence[int]) -> None:
        """Let go of slots; those that nobody needs, as the device has their contents, are empty."""
        self.host.free(slots)
        for slot in slots:
            name = self.host.name_of(slot)
            if (
                name is not None
                and not self.host.is_held(slot)
                and self.device.find(name) is not None
            ):
                self._empty(slot)

    def _empty(self, slot: int) -> None:
        self.host.unname(slot)
        self._copies_out.pop(slot, None)

    # Integrity

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the rules above hold; between steps.

        `block_tables` are those of all sequences that hold blocks.
        """
        device, host = self.device, self.host
        device.check_integrity()
        host.check_integrity()
        holds = Counter(block_id for table in block_tables for block_id in table)
        held = {b: count for b, count in enumerate(device.ref_counts()) if count}
        assert held == holds, "sequences hold what is held"
        assert not self._copies_in, "what comes in has come in"
        turns, host_turns = device.eviction_order(), host.eviction_order()
        for block_hash, parent in self._parents.items():
            is_on_device = device.find(block_hash) is not None
            if is_on_device:
                assert block_hash not in host_turns, "nothing is cached twice"
            if parent is None:
                continue
            assert parent in self._parents, "the predecessor of what is cached is cached"
            if is_on_device:
                assert device.find(parent) is not None, "on the device, too"
                if parent in turns:
                    assert block_hash in turns, "a held block's predecessor is held"
                    assert turns[block_hash] < turns[parent], "a block goes before its predecessor"
            elif parent in host_turns:
                assert block_hash in host_turns, "a held slot's predecessor is held"
                assert host_turns[block_hash] < host_turns[parent], "leaves first"
        named = device.names() | host.names()
        assert named == self._parents.keys(), "what has a name is cached, and nothing else"
