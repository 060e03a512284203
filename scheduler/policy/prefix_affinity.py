"""Which group will have cached which prefix: what it has reported, and what was sent there lately.

The directory tells what a group has cached. What was sent to it a moment ago is not computed or not
reported yet, but the next request with the same prefix should follow all the same. So what is sent
counts as cached for a while, until the group has reported it: from then on its reports alone count,
also when they say that it was evicted.

What was sent is bounded, and a guess; a wrong one costs a prefill, never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from wire.ids import BlockHash

MAX_BLOCKS_PER_GROUP = 65_536
LATELY_S = 30.0
"""A request that has waited in a group for longer than that is not counted on any more."""


class PrefixAffinity:
    """For each group, the hashes of the blocks sent there lately, by when, the oldest first."""

    def __init__(
        self, max_blocks_per_group: int = MAX_BLOCKS_PER_GROUP, *, lately_s: float = LATELY_S
    ) -> None:
        self._max_blocks = max_blocks_per_group
        self._lately_s = lately_s
        self._sent: dict[str, OrderedDict[BlockHash, float]] = {}

    def num_cached_blocks(
        self, group: str, chain: Sequence[BlockHash], num_reported: int, now_s: float
    ) -> int:
        """How many blocks of a prompt the group has, or will soon have, from the first one on.

        It has reported the first `num_reported`.
        """
        sent = self._sent.get(group)
        if not sent:
            return num_reported
        self._forget_old(sent, now_s)
        for block_hash in reversed(chain[:num_reported]):
            if sent.pop(block_hash, None) is None:
                break  # nor any before it: they were reported together
        # The hashes are chained, so that those sent go on from there: search for where they end.
        low, high = num_reported, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in sent:
                low = middle
            else:
                high = middle - 1
        return low

    def note(self, group: str, chain: Sequence[BlockHash], num_reported: int, now_s: float) -> None:
        """A request is sent to the group, which has reported the first blocks of its prompt."""
        sent = self._sent.setdefault(group, OrderedDict())
        # Last block first, so that a prefix is always more recent than what follows it and the
        # bounds cut chains from their ends.
        for block_hash in reversed(chain[num_reported:]):
            sent[block_hash] = now_s
            sent.move_to_end(block_hash)
        while len(sent) > self._max_blocks:
            sent.popitem(last=False)

    def forget(self, group: str) -> None:
        """Drop what is known of a group that is gone."""
        self._sent.pop(group, None)

    def _forget_old(self, sent: OrderedDict[BlockHash, float], now_s: float) -> None:
        while sent:
            block_hash, sent_s = next(iter(sent.items()))
            if now_s - sent_s <= self._lately_s:
                return
            del sent[block_hash]
