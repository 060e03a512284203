from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cache.block_pool import BlockPool
from cache.prefix_hash import PrefixHasher
from wire.ids import BlockHash, token_ids

BLOCK_SIZE = 2
HASHER = PrefixHasher(model="m", cache_format="f", salt=b"", block_size=BLOCK_SIZE)


def chain(*tokens: int) -> list[BlockHash]:
    return HASHER.hash_blocks(token_ids(tokens))


def fill(pool: BlockPool, hashes: list[BlockHash]) -> list[int]:
    """What a sequence does: reuse what is there, allocate the rest, compute and register it."""
    table = pool.find_prefix(hashes)
    pool.touch(table)
    table += pool.allocate(len(hashes) - len(table)) or []
    for i, block_hash in enumerate(hashes):
        table[i] = pool.register(table[i], block_hash, table[i - 1] if i else None)
    return table


def test_all_blocks_can_be_allocated_and_not_one_more() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_too_large_an_allocation_changes_nothing() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_freed_blocks_keep_their_contents_until_they_are_needed() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table = fill(pool, chain(1, 2, 3, 4))
    pool.free(table)
    assert pool.num_free == 4
    assert pool.find_prefix(chain(1, 2, 3, 4, 5, 6)) == table


def test_empty_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table = fill(pool, chain(1, 2))
    unregistered = pool.allocate(1) or []
    pool.free(table)
    pool.free(unregistered)
    assert not set(pool.allocate(3) or []) & set(table)
    assert pool.find_prefix(chain(1, 2)) == table


def test_the_longest_unused_contents_are_evicted_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    old, new = chain(1, 1, 2, 2), chain(3, 3, 4, 4)
    for hashes in (old, new):
        pool.free(fill(pool, hashes))
    evicted_down_to = []
    for _ in range(4):
        pool.allocate(1)
        evicted_down_to.append((len(pool.find_prefix(old)), len(pool.find_prefix(new))))
    assert evicted_down_to == [(1, 2), (0, 2), (0, 1), (0, 0)]


def test_a_second_copy_of_known_contents_gives_way_to_the_first() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    (block_hash,) = chain(1, 2)
    first, second = pool.allocate(2) or []
    assert pool.register(first, block_hash, None) == first
    assert pool.register(second, block_hash, None) == first
    assert pool.num_free == 3
    pool.check_integrity([[first], [first]])


def test_what_another_sequence_holds_is_not_evicted_when_one_lets_go() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    one = fill(pool, chain(1, 2))
    other = fill(pool, chain(1, 2))
    assert one == other
    pool.free(one)
    assert pool.allocate(2) is None
    pool.free(other)
    assert pool.allocate(2) is not None


def test_what_is_forgotten_is_found_by_nobody_with_all_that_continues_it() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    bad = fill(pool, chain(1, 1, 2, 2, 3, 3))
    other = fill(pool, chain(1, 1, 4, 4))
    unrelated = fill(pool, chain(5, 5))
    pool.forget(bad[1:])
    assert pool.find_prefix(chain(1, 1, 2, 2)) == bad[:1]
    assert pool.find_prefix(chain(1, 1, 4, 4)) == other
    pool.forget(bad)
    assert pool.find_prefix(chain(1, 1, 4, 4)) == []
    assert pool.find_prefix(chain(5, 5)) == unrelated
    pool.check_integrity([bad, other, unrelated])
    for table in (bad, other, unrelated):
        pool.free(table)
    pool.check_integrity([])


def test_behind_a_forgotten_block_nothing_is_registered() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    first, second = chain(1, 1, 2, 2)
    table = pool.allocate(2) or []
    pool.register(table[0], first, None)
    pool.forget(table[:1])
    assert pool.register(table[1], second, table[0]) == table[1]
    assert pool.find_prefix([first, second]) == []
    pool.check_integrity([table])


class Sequences(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet, so that prefixes are shared often, in a tiny pool."""

    tables: Bundle[tuple[list[int], list[int]]] = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, BLOCK_SIZE)
        self.held: list[list[int]] = []
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> the tokens up to its end

    @rule(target=tables, blocks=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Take what is cached of a prompt of `blocks`, and room for the rest."""
        tokens = [token for block in blocks for token in (block, block)]
        table = self.pool.find_prefix(HASHER.hash_blocks(token_ids(tokens)))
        for i, block_id in enumerate(table):
            assert self.contents[block_id] == tuple(tokens[: (i + 1) * BLOCK_SIZE])
        free_before = self.pool.num_free
        num_taken = self.pool.num_free_among(table)
        self.pool.touch(table)
        assert self.pool.num_free == free_before - num_taken
        new = self.pool.allocate(len(blocks) - len(table))
        if new is None:
            self.pool.free(table)
            return [], []
        for block_id in new:
            assert not any(block_id in held for held in self.held), "blocks do not overlap"
            self.contents.pop(block_id, None)
        table += new
        self.held.append(table)
        return tokens, table

    @rule(sequence=tables, share=st.floats(0, 1))
    def compute(self, sequence: tuple[list[int], list[int]], share: float) -> None:
        """Fill and register the first blocks of a sequence."""
        tokens, table = sequence
        hashes = HASHER.hash_blocks(token_ids(tokens))
        for i in range(round(share * len(hashes))):
            block_id = self.pool.register(table[i], hashes[i], table[i - 1] if i else None)
            table[i] = block_id
            self.contents[block_id] = tuple(tokens[: (i + 1) * BLOCK_SIZE])

    @rule(sequence=tables)
    def forget(self, sequence: tuple[list[int], list[int]]) -> None:
        """Let nobody find what a sequence has, which it may go on to hold."""
        self.pool.forget(sequence[1])

    @rule(sequence=consumes(tables))
    def finish(self, sequence: tuple[list[int], list[int]]) -> None:
        table = sequence[1]
        self.held = [held for held in self.held if held is not table]
        self.pool.free(table)

    @invariant()
    def nothing_leaks_or_overlaps(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.num_held + self.pool.num_free == self.pool.num_blocks


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_long_random_run_ends_with_every_block_free() -> None:
    pool, choose = BlockPool(32, BLOCK_SIZE), random.Random(1)
    held: list[list[int]] = []
    for _ in range(2000):
        tokens = [choose.randrange(3) for _ in range(choose.randrange(2, 24))]
        hashes = HASHER.hash_blocks(token_ids(tokens))
        if pool.num_free >= len(hashes):
            held.append(fill(pool, hashes))
        while held and choose.random() < 0.5:
            pool.free(held.pop(choose.randrange(len(held))))
    for table in held:
        pool.free(table)
    pool.check_integrity([])
    assert pool.num_free == 32
