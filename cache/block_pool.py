"""The blocks of one memory: who holds which, what they contain, and which is given up next.

Every block is in exactly one of three states:

    held      reference count above 0: that many hold it
    cached    reference count 0, contents named by a hash: can be held again, or evicted
    empty     reference count 0, nothing of use in it

Cached and empty blocks together are the *free* ones. They are reused in this order:

    1. empty ones
    2. cached ones that nobody is known to want, least recently used first; what was found again
       since it was computed counts as used later than it was, by as many allocations as there are
       blocks: most contents are never used again, and those that were once are likely to be
    3. cached ones that are wanted, least recently used first

There is a pool for the device's memory and one for the host's; `cache.tiers` has the rules that
hold between blocks and between the two. Nothing here knows of tensors or of the time; one thread
owns a pool.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TypeAlias

from wire.ids import BlockHash

OnEvict: TypeAlias = Callable[[int, BlockHash], None]
"""Told of a cached block that is about to be reused, which it may not hold."""


class BlockPool:
    """A fixed number of blocks, numbered from 0.

    `wanted` has the contents that somebody is waiting to use; `sort` blocks when it changes.
    """

    def __init__(
        self, num_blocks: int, on_evict: OnEvict, wanted: Container[BlockHash] = ()
    ) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._wanted = wanted
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._named: dict[BlockHash, int] = {}
        self._patience = num_blocks
        self._num_allocated = 0  # blocks, since the beginning: what time is counted in
        self._is_proven = [False] * num_blocks  # found again since it was computed
        self._freed_at = [0] * num_blocks
        # The free blocks, each list least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._proven: OrderedDict[int, None] = OrderedDict()
        self._spared: OrderedDict[int, None] = OrderedDict()  # wanted

    @property
    def num_free(self) -> int:
        """How many blocks can be allocated, cached ones included."""
        return len(self._free) + len(self._proven) + len(self._spared)

    @property
    def num_held(self) -> int:
        """How many blocks are held."""
        return self.num_blocks - self.num_free

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold `num_blocks` blocks of undefined contents; None, and no change, if too few are free.

        Takes empty blocks first, then evicts cached ones.
        """
        if num_blocks > self.num_free:
            return None
        self._num_allocated += num_blocks
        block_ids = [self._take_next() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            block_hash = self._hashes[block_id]
            if block_hash is not None:
                del self._named[block_hash]
                self._hashes[block_id] = None
                self._on_evict(block_id, block_hash)
            self._is_proven[block_id] = False
        return block_ids

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with these contents; `touch` it to use it."""
        return self._named.get(block_hash)

    def find_all(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks with these contents, up to the first that is not here."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._named.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def name_of(self, block_id: int) -> BlockHash | None:
        """The name of the block's contents, if it has one."""
        return self._hashes[block_id]

    def is_held(self, block_id: int) -> bool:
        """Whether anybody holds the block."""
        return self._ref_counts[block_id] > 0

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks `touch` would take from the free ones."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def touch(self, block_ids: Iterable[int]) -> None:
        """Hold these blocks, which were found by their contents, once more."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                self._take(block_id)
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Let go of blocks, given in the order of their contents: the last one is evicted first."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._put(block_id)

    def sort(self, block_ids: Sequence[int]) -> None:
        """Find the place again of those blocks that are free, as if they had just been let go."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] == 0:
                self._take(block_id)
                self._put(block_id)

    def name(self, block_id: int, block_hash: BlockHash, *, is_proven: bool = False) -> None:
        """Make a held block without a name findable by its contents."""
        self._named[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._is_proven[block_id] = is_proven

    def is_proven(self, block_id: int) -> bool:
        """Whether the contents were found again; also of a block that is just being evicted."""
        return self._is_proven[block_id]

    def prove(self, block_ids: Iterable[int]) -> None:
        """The contents of these held blocks were found again."""
        for block_id in block_ids:
            self._is_proven[block_id] = True

    def unname(self, block_id: int) -> None:
        """Make a block unfindable: its contents are no good, or elsewhere; holds stay."""
        block_hash = self._hashes[block_id]
        assert block_hash is not None, "only a block with a name can lose it"
        del self._named[block_hash]
        self._hashes[block_id] = None
        self.sort((block_id,))

    def names(self) -> set[BlockHash]:
        """The contents that can be found here."""
        return set(self._named)

    def ref_counts(self) -> list[int]:
        """How many hold each block."""
        return self._ref_counts.copy()

    def eviction_order(self) -> dict[BlockHash, int]:
        """The cached contents, each with its turn to be evicted."""
        cached = [block_id for block_id in self._free if self._hashes[block_id] is not None]
        due = {block_id: self._freed_at[block_id] for block_id in cached}
        due.update({b: self._freed_at[b] + self._patience for b in self._proven})
        unwanted = heapq.merge(cached, self._proven, key=due.__getitem__)
        names = (self._hashes[block_id] for block_id in (*unwanted, *self._spared))
        return {name: turn for turn, name in enumerate(names) if name is not None}

    def check_integrity(self) -> None:
        """Raise AssertionError unless all that this module promises holds."""
        free = [b for b in range(self.num_blocks) if not self._ref_counts[b]]
        places = (*self._free, *self._proven, *self._spared)
        assert sorted(places) == free, "a block that nobody holds has one place, others none"
        assert min(self._ref_counts, default=0) >= 0, "nobody lets go of what he does not hold"
        named = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert named == self._named, "names and blocks belong together one to one"
        emptied = [self._hashes[block_id] is None for block_id in self._free]
        assert emptied == sorted(emptied, reverse=True), "empty blocks are reused first"
        assert not any(map(self._is_wanted, (*self._free, *self._proven))), "they are spared"
        assert all(map(self._is_wanted, self._spared)), "others are not"
        assert all(self._is_proven[block_id] for block_id in self._proven), "they were found again"

    def _is_wanted(self, block_id: int) -> bool:
        block_hash = self._hashes[block_id]
        return block_hash is not None and block_hash in self._wanted

    def _take_next(self) -> int:
        blocks = self._free or self._proven or self._spared
        if self._free and self._proven:
            oldest, proven = next(iter(self._free)), next(iter(self._proven))
            if (
                self._hashes[oldest] is not None
                and self._freed_at[oldest] > self._freed_at[proven] + self._patience
            ):
                blocks = self._proven
        return blocks.popitem(last=False)[0]

    def _take(self, block_id: int) -> None:
        for blocks in (self._free, self._proven, self._spared):
            if block_id in blocks:
                del blocks[block_id]
                return

    def _put(self, block_id: int) -> None:
        self._freed_at[block_id] = self._num_allocated
        if self._hashes[block_id] is None:
            self._free[block_id] = None
            self._free.move_to_end(block_id, last=False)
        elif self._is_wanted(block_id):
            self._spared[block_id] = None
        elif self._is_proven[block_id]:
            self._proven[block_id] = None
        else:
            self._free[block_id] = None
