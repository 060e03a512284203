from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.prefix_hash import HASH_BYTES, PrefixHasher
from wire.ids import token_ids

BLOCK_SIZE = 4
GOLDEN = [
    "38f26e46cd137116e4987f06aa171fae",
    "c74de7bd59c45291723f8950782d5fb0",
]  # of tokens 0 to 7
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def make_hasher(model: str = "m", cache_format: str = "f", salt: bytes = b"s") -> PrefixHasher:
    return PrefixHasher(model=model, cache_format=cache_format, salt=salt, block_size=BLOCK_SIZE)


@given(TOKENS)
def test_only_full_blocks_have_a_hash(tokens: list[int]) -> None:
    hashes = make_hasher().hash_blocks(token_ids(tokens))
    assert len(hashes) == len(tokens) // BLOCK_SIZE
    assert all(len(block_hash) == HASH_BYTES for block_hash in hashes)


@given(TOKENS, st.integers(0, 10))
def test_a_chain_can_be_continued_from_any_of_its_blocks(tokens: list[int], cut: int) -> None:
    hasher = make_hasher()
    whole = hasher.hash_blocks(token_ids(tokens))
    cut = min(cut, len(whole))
    rest = token_ids(tokens[cut * BLOCK_SIZE :])
    assert whole[:cut] + hasher.hash_blocks(rest, whole[cut - 1] if cut else None) == whole


@given(TOKENS.filter(lambda tokens: len(tokens) >= BLOCK_SIZE), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    tokens: list[int], data: st.DataObject
) -> None:
    where = data.draw(st.integers(0, len(tokens) // BLOCK_SIZE * BLOCK_SIZE - 1))
    changed = tokens.copy()
    changed[where] ^= 1
    before = make_hasher().hash_blocks(token_ids(tokens))
    after = make_hasher().hash_blocks(token_ids(changed))
    same = [one == other for one, other in zip(before, after, strict=True)]
    assert same == [i < where // BLOCK_SIZE for i in range(len(same))]


@pytest.mark.parametrize(
    "other",
    [make_hasher(model="n"), make_hasher(cache_format="g"), make_hasher(salt=b"t")],
    ids=["model", "cache format", "salt"],
)
def test_chains_of_different_keys_have_nothing_in_common(other: PrefixHasher) -> None:
    tokens = token_ids(range(40))
    assert not set(make_hasher().hash_blocks(tokens)) & set(other.hash_blocks(tokens))


def test_parts_of_the_key_cannot_be_shifted_into_each_other() -> None:
    tokens = token_ids(range(BLOCK_SIZE))
    one = make_hasher(model="ab", cache_format="c").hash_blocks(tokens)
    other = make_hasher(model="a", cache_format="bc").hash_blocks(tokens)
    assert one != other


def test_hashes_are_the_same_on_every_machine_and_in_every_version() -> None:
    hashes = make_hasher().hash_blocks(token_ids(range(8)))
    assert [block_hash.hex() for block_hash in hashes] == GOLDEN
