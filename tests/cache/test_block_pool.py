from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.block_pool import BlockPool
from wire.ids import BlockHash


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def pool_of(num_blocks: int, *, wanted: tuple[int, ...] = ()) -> tuple[BlockPool, list[BlockHash]]:
    """A pool, and the contents that it evicts, as it evicts them."""
    evicted: list[BlockHash] = []
    wanted_names = {name(number) for number in wanted}
    return BlockPool(
        num_blocks, lambda _, block_hash: evicted.append(block_hash), wanted_names
    ), evicted


def fill(pool: BlockPool, *numbers: int) -> list[int]:
    block_ids = pool.allocate(len(numbers)) or []
    for block_id, number in zip(block_ids, numbers, strict=True):
        pool.name(block_id, name(number))
    return block_ids


def test_all_blocks_can_be_allocated_and_not_one_more() -> None:
    pool, _ = pool_of(3)
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_too_large_an_allocation_changes_nothing() -> None:
    pool, evicted = pool_of(3)
    pool.free(fill(pool, 1))
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert not evicted


def test_freed_blocks_keep_their_contents_until_they_are_needed() -> None:
    pool, evicted = pool_of(4)
    table = fill(pool, 1, 2)
    pool.free(table)
    assert pool.num_free == 4
    assert pool.find_all([name(1), name(2), name(3)]) == table
    pool.allocate(2)
    assert not evicted, "empty blocks are used before cached ones"
    pool.allocate(1)
    assert evicted == [name(2)]


def test_the_longest_unused_contents_are_evicted_first_and_tails_before_heads() -> None:
    pool, evicted = pool_of(4)
    for numbers in ((1, 2), (3, 4)):
        pool.free(fill(pool, *numbers))
    pool.allocate(4)
    assert evicted == [name(2), name(1), name(4), name(3)]


def test_what_is_wanted_is_evicted_last() -> None:
    pool, evicted = pool_of(4, wanted=(1, 2))
    for numbers in ((1, 2), (3, 4)):
        pool.free(fill(pool, *numbers))
    pool.allocate(4)
    assert evicted == [name(4), name(3), name(2), name(1)]


def test_what_was_found_again_is_kept_for_as_many_allocations_longer_as_there_are_blocks() -> None:
    pool, evicted = pool_of(3)
    table = fill(pool, 1)
    pool.prove(table)
    pool.free(table)
    for number in range(2, 8):
        pool.free(fill(pool, number))
    assert evicted == [name(2), name(3), name(4), name(1)]


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool, _ = pool_of(2)
    table = fill(pool, 1)
    pool.touch(table)
    pool.free(table)
    assert pool.is_held(table[0])
    assert pool.allocate(2) is None
    pool.free(table)
    assert pool.allocate(2) is not None


def test_a_block_without_a_name_is_found_by_nobody_and_reused_first() -> None:
    pool, evicted = pool_of(2)
    table = fill(pool, 1, 2)
    pool.unname(table[0])
    assert pool.find(name(1)) is None
    pool.free(table)
    assert pool.allocate(1) == [table[0]]
    pool.free([table[0]])
    pool.unname(table[1])
    pool.allocate(2)
    assert not evicted


class Blocks(RuleBasedStateMachine):
    """Blocks are held, named, shared, let go and wanted in any order."""

    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.wanted: set[BlockHash] = set()
        self.cached: dict[BlockHash, int] = {}
        self.pool = BlockPool(self.NUM_BLOCKS, self.evict, self.wanted)
        self.holds: list[int] = []

    def evict(self, block_id: int, block_hash: BlockHash) -> None:
        assert block_id not in self.holds, "blocks do not overlap"
        assert self.cached.pop(block_hash) == block_id
        is_wanted = block_hash in self.wanted
        others = [h for h, b in self.cached.items() if b not in self.holds and h not in self.wanted]
        assert not (is_wanted and set(others) - self.in_hand), "what is not wanted goes first"

    @rule(count=st.integers(0, 3))
    def allocate(self, count: int) -> None:
        free = {h for h, b in self.cached.items() if b not in self.holds}
        self.in_hand = set(list(self.pool.eviction_order())[:count]) & free
        block_ids = self.pool.allocate(count)
        assert (block_ids is None) == (self.NUM_BLOCKS - len(set(self.holds)) < count)
        self.holds += block_ids or []

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), number=st.integers(0, 9))
    def give_name(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from(self.holds))
        if self.pool.name_of(block_id) is None and self.pool.find(name(number)) is None:
            self.pool.name(block_id, name(number))
            self.cached[name(number)] = block_id

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.holds))
        self.holds.remove(block_id)
        self.pool.free((block_id,))

    @precondition(lambda self: self.cached)
    @rule(data=st.data(), how=st.sampled_from(["touch", "unname", "want", "unwant"]))
    def change(self, data: st.DataObject, how: str) -> None:
        block_hash = data.draw(st.sampled_from(sorted(self.cached)))
        block_id = self.cached[block_hash]
        assert self.pool.find(block_hash) == block_id
        if how == "touch":
            self.pool.touch((block_id,))
            self.holds.append(block_id)
        elif how == "unname":
            self.pool.unname(block_id)
            del self.cached[block_hash]
        else:
            (self.wanted.add if how == "want" else self.wanted.discard)(block_hash)
            self.pool.sort((block_id,))

    @invariant()
    def nothing_leaks_or_overlaps(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_held == len(set(self.holds))
        assert self.pool.num_held + self.pool.num_free == self.NUM_BLOCKS
        assert self.pool.names() == self.cached.keys()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
