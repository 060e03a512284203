"""A device and a host memory for a `TieredCache`, in which a block's contents can be looked at."""

from __future__ import annotations

from typing import TypeAlias

from cache.prefix_hash import PrefixHasher
from cache.tiers import Moves, TieredCache
from wire.ids import BlockHash, token_ids

BLOCK_SIZE = 2
HASHER = PrefixHasher(model="m", cache_format="f", salt=b"", block_size=BLOCK_SIZE)

Contents: TypeAlias = tuple[int, ...]
"""The tokens up to a block's end: what its keys and values depend on."""


def tokens_of(letters: list[int]) -> list[int]:
    """One block for each letter."""
    return [letter for letter in letters for _ in range(BLOCK_SIZE)]


def chain(letters: list[int]) -> list[BlockHash]:
    return HASHER.hash_blocks(token_ids(tokens_of(letters)))


def contents(letters: list[int]) -> list[Contents]:
    """What each block of these letters has in it."""
    tokens = tuple(tokens_of(letters))
    return [tokens[: (i + 1) * BLOCK_SIZE] for i in range(len(letters))]


class TierMemory:
    """Both memories, in which plans make their copies, and what was told of the cache's changes."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.cache = TieredCache(num_blocks, BLOCK_SIZE, num_slots)
        self.blocks: list[Contents | None] = [None] * num_blocks
        self.slots: list[Contents | None] = [None] * num_slots
        self.told: dict[BlockHash, str] = {}  # tier of all that is cached, by what was told
        self.num_copies_out = 0
        self.num_copies_in = 0

    def copy(self) -> None:
        """What a plan does before it computes, in its order."""
        copies_out, copies_in = self.cache.take_copies()
        assert len({copy.slot for copy in copies_out}) == len(copies_out)
        assert len({copy.block_id for copy in copies_in}) == len(copies_in)
        for block_id, slot in copies_out:
            self.slots[slot] = self.blocks[block_id]
        for block_id, slot in copies_in:
            self.blocks[block_id] = self.slots[slot]
        self.num_copies_out += len(copies_out)
        self.num_copies_in += len(copies_in)

    def listen(self) -> None:
        """Take in what has moved, as a directory would."""
        moves = self.cache.take_moves()
        for tier, packed in (moves or Moves(b"", b"", b""))._asdict().items():
            for start in range(0, len(packed), 16):
                block_hash = BlockHash(packed[start : start + 16])
                assert self.told.get(block_hash, "gone") != tier, "only changes are told"
                if tier == "gone":
                    del self.told[block_hash]
                else:
                    self.told[block_hash] = tier

    def run(self, letters: list[int]) -> list[int]:
        """A sequence that is admitted, computed and registered in one step; its blocks."""
        table = self.admit(letters)
        self.copy()
        self.compute(letters, table)
        self.listen()
        return table

    def admit(self, letters: list[int]) -> list[int]:
        return self.cache.hold(self.cache.find_prefix(chain(letters)), len(letters))

    def compute(self, letters: list[int], table: list[int]) -> None:
        """Write what is not registered yet; read all of it."""
        hashes = chain(letters)
        for i, wanted in enumerate(contents(letters)):
            if self.cache.device.name_of(table[i]) is None:
                self.blocks[table[i]] = wanted
            table[i] = self.cache.register(table[i], hashes[i], table[i - 1] if i else None)
            assert self.blocks[table[i]] == wanted, "a sequence reads what is its own"
