"""Which group has probably cached which prefix, judged by where requests were sent.

A bounded guess, not a directory: a group may have evicted a block long ago, and a wrong guess
costs a prefill, never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from wire.ids import BlockHash

MAX_BLOCKS_PER_GROUP = 65_536


class PrefixAffinity:
    """For each group, the hashes of the blocks sent there lately, least recent first."""

    def __init__(self, max_blocks_per_group: int = MAX_BLOCKS_PER_GROUP) -> None:
        self._max_blocks = max_blocks_per_group
        self._blocks: dict[str, OrderedDict[BlockHash, None]] = {}

    def num_cached_blocks(self, group: str, block_hashes: Sequence[BlockHash]) -> int:
        """The length of the longest prefix, in blocks, that the group has seen."""
        seen = self._blocks.get(group)
        if not seen:
            return 0
        # The hashes are chained, so that those seen are a prefix: search for where it ends.
        low, high = 0, len(block_hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if block_hashes[middle - 1] in seen:
                low = middle
            else:
                high = middle - 1
        return low

    def note(self, group: str, block_hashes: Sequence[BlockHash]) -> None:
        """Remember that the group was sent these blocks."""
        seen = self._blocks.setdefault(group, OrderedDict())
        # Last block first, so that a prefix is always more recent than what follows it and the
        # bound cuts chains from their ends.
        for block_hash in reversed(block_hashes):
            seen[block_hash] = None
            seen.move_to_end(block_hash)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)

    def forget(self, group: str) -> None:
        """Drop what is known of a group that is gone."""
        self._blocks.pop(group, None)
