"""A prefix cache that knows the future: what it keeps is what will be used soonest.

It runs in the place of the real one, under the same scheduler and with the same memory, and differs
in what it evicts: of the blocks that nobody holds the one whose next use is farthest away (Belady,
"A study of replacement algorithms", 1966), of equals the one deepest in its chain, a leaf. What
uses a block also uses its predecessors, so the rules of `cache.tiers` hold.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence

from cache.block_pool import BlockPool, OnEvict
from cache.tiers import TieredCache
from wire.ids import BlockHash

NEVER = 1 << 60


class Future:
    """Which requests, by their numbers in order of arrival, will use which contents."""

    def __init__(self, chains: Sequence[Sequence[BlockHash]]) -> None:
        """`chains`: of each request, the blocks that it can use if they are cached."""
        self.depth: dict[BlockHash, int] = {}
        self._uses: dict[BlockHash, list[int]] = {}
        self._is_past = bytearray(len(chains))
        # The last one first, so that those that are past can be taken from the end.
        for number in range(len(chains) - 1, -1, -1):
            for depth, block_hash in enumerate(chains[number]):
                self.depth[block_hash] = depth
                self._uses.setdefault(block_hash, []).append(number)

    def pass_by(self, number: int) -> None:
        """This request has what it could use."""
        self._is_past[number] = True

    def next_use(self, block_hash: BlockHash) -> int:
        """The number of the first request to come that uses these contents."""
        uses = self._uses.get(block_hash)
        while uses and self._is_past[uses[-1]]:
            uses.pop()
        return uses[-1] if uses else NEVER


class OraclePool(BlockPool):
    """Evicts what is used again last."""

    def __init__(
        self, num_blocks: int, on_evict: OnEvict, wanted: Container[BlockHash], future: Future
    ) -> None:
        self._future = future
        self._turns: list[tuple[int, int, int, int]] = []  # with some that have changed since
        self._stamps = [0] * num_blocks
        super().__init__(num_blocks, on_evict, wanted)

    def _put(self, block_id: int) -> None:
        super()._put(block_id)
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            next_use = self._future.next_use(block_hash)
            if next_use == NEVER and block_hash in self._wanted:
                next_use = 0  # by one that was preempted
            depth = self._future.depth.get(block_hash, NEVER)
            heapq.heappush(self._turns, (-next_use, -depth, block_id, self._stamps[block_id]))

    def _take(self, block_id: int) -> None:
        self._stamps[block_id] += 1
        super()._take(block_id)

    def _take_next(self) -> int:
        first = next(iter(self._free), None)
        if first is not None and self._hashes[first] is None:
            self._take(first)
            return first
        while True:
            _, _, block_id, stamp = heapq.heappop(self._turns)
            if stamp == self._stamps[block_id]:
                self._take(block_id)
                return block_id


class OracleCache(TieredCache):
    """A `TieredCache` over two memories that know the future."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, future: Future) -> None:
        super().__init__(num_blocks, block_size, num_slots)
        self.device = OraclePool(num_blocks, self._evict, self._wanted, future)
        self.host = OraclePool(num_slots, self._lose, self._wanted, future)

    def has_or_awaits(self, block_hash: BlockHash) -> bool:
        """Whether these contents are cached, or will be when those that wait have run."""
        return block_hash in self._parents or block_hash in self._wanted


class PlainCache(TieredCache):
    """A `TieredCache` that evicts what was used least recently, whatever else is known of it."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_slots)
        for pool in (self.device, self.host):
            pool._patience = 0

    def want(self, hashes: Sequence[BlockHash]) -> None:
        """Not noted."""

    def unwant(self, hashes: Sequence[BlockHash]) -> None:
        """Nothing was noted."""
