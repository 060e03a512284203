"""The KV-cache's blocks: who holds which, what they contain, and which is given up next.

Every block is in exactly one of three states:

    held      reference count above 0: in the block table of that many sequences
    cached    reference count 0, contents registered under a hash: can be held again, or evicted
    empty     reference count 0, nothing of use in it

Cached and empty blocks together are the *free* ones, kept in the order in which they will be
reused: empty ones first, then cached ones, least recently used first.

The registered blocks form a forest by prefix, and it stays *prefix closed*: a registered block's
predecessor is registered too, held if its successor is held, and reused only after it. Three rules
make it so: a sequence whose full block has the contents of one already registered changes over to
that one (`register`), a sequence's blocks are freed last block first (`free`), and a block is
forgotten with all that continue it (`forget`).

Nothing here knows of tensors or of the time; one thread owns the pool.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from wire.ids import BlockHash


class BlockPool:
    """A fixed number of blocks, numbered from 0, of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._parents: list[int | None] = [None] * num_blocks  # predecessor of a registered block
        self._registered: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """How many blocks can be allocated, cached ones included."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """How many blocks sequences hold."""
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take up."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold `num_blocks` blocks of undefined contents; None, and no change, if too few are free.

        Takes empty blocks first, then evicts the cached ones that were used longest ago.
        """
        if num_blocks > len(self._free):
            return None
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            block_hash = self._hashes[block_id]
            if block_hash is not None:
                del self._registered[block_hash]
                self._hashes[block_id] = None
                self._parents[block_id] = None
        return block_ids

    def find_prefix(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks with the longest registered prefix of this chain; `touch` them to use them."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._registered.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks `touch` would take from the free ones."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def num_held_once_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks one sequence alone holds."""
        return sum(self._ref_counts[block_id] == 1 for block_id in block_ids)

    def touch(self, block_ids: Iterable[int]) -> None:
        """Hold these blocks, found by `find_prefix`, once more."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def register(self, block_id: int, block_hash: BlockHash, parent: int | None) -> int:
        """Make a full, computed block findable by its contents; returns the block to use now.

        That is another one if those contents were registered before: the caller's hold moves to it
        and `block_id` is freed. `parent` is the block before it in the caller's block table, None
        for a sequence's first; behind one that was forgotten, nothing is registered.
        """
        if parent is not None and self._hashes[parent] is None:
            return block_id
        existing = self._registered.get(block_hash)
        if existing is None:
            self._registered[block_hash] = block_id
            self._hashes[block_id] = block_hash
            self._parents[block_id] = parent
            return block_id
        if existing != block_id:
            self.touch((existing,))
            self.free((block_id,))
        return existing

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make these blocks, and all that continue them, unfindable: their contents are no good.

        Whoever holds them keeps them. This looks at every registered block: it is for rare events.
        """
        doomed = {block_id for block_id in block_ids if self._hashes[block_id] is not None}
        behind: dict[int, list[int]] = {}
        for block_id in self._registered.values():
            parent = self._parents[block_id]
            if parent is not None:
                behind.setdefault(parent, []).append(block_id)
        to_visit = list(doomed)
        while to_visit:
            further = behind.get(to_visit.pop(), [])
            doomed.update(further)
            to_visit += further
        for block_id in doomed:
            block_hash = self._hashes[block_id]
            assert block_hash is not None, "only registered blocks continue others"
            del self._registered[block_hash]
            self._hashes[block_id] = self._parents[block_id] = None
            if self._ref_counts[block_id] == 0:
                self._free.move_to_end(block_id, last=False)

    def free(self, block_table: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in the order of its block table."""
        # Last block first: it is then evicted first, and what remains is still a usable prefix.
        for block_id in reversed(block_table):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless all that this module promises holds.

        `block_tables` are those of all sequences that hold blocks.
        """
        holds = Counter(block_id for table in block_tables for block_id in table)
        assert all(self._ref_counts[b] == holds[b] for b in range(self.num_blocks)), "ref counts"
        free = {b for b in range(self.num_blocks) if not self._ref_counts[b]}
        assert self._free.keys() == free, "the free blocks are those that nobody holds"
        named = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert named == self._registered, "names and blocks belong together one to one"
        self._check_prefix_closed()

    def _check_prefix_closed(self) -> None:
        turn = {block_id: position for position, block_id in enumerate(self._free)}
        emptied = [self._hashes[block_id] is None for block_id in self._free]
        assert emptied == sorted(emptied, reverse=True), "empty blocks are reused first"
        for block_id in self._registered.values():
            parent = self._parents[block_id]
            if parent is None:
                continue
            assert self._hashes[parent] is not None, (
                "a registered block's predecessor is registered"
            )
            if parent in turn:
                assert block_id in turn, "a held block's predecessor is held"
                assert turn[block_id] < turn[parent], "a block is evicted before its predecessor"
