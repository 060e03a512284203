"""A reader's position: what of a chunk lies behind it, wherever the output is cut. No server."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.position import StreamPosition, is_gap, rest_of
from support.known_output import KnownOutput, assert_adds_up
from wire.errors import ConfigError
from wire.ids import token_ids
from wire.messages import Chunk

NUM_TOKENS = 12
CUTS = st.sets(st.integers(1, NUM_TOKENS - 1))


def read(chunks: list[Chunk], position: StreamPosition) -> list[Chunk]:
    """What a reader at `position` takes from a journal of these chunks."""
    taken = []
    for chunk in chunks:
        assert not is_gap(chunk, position)
        rest = rest_of(chunk, position)
        if rest is not None:
            position = StreamPosition.behind(rest)
            taken.append(rest)
    return taken


@settings(deadline=None)
@given(first=CUTS, then=CUTS, num_read=st.integers(0, NUM_TOKENS))
def test_however_the_output_is_cut_the_second_time_it_adds_up(
    first: set[int], then: set[int], num_read: int
) -> None:
    output = KnownOutput(NUM_TOKENS, logprobs=True)
    before = output.chunks(first)[:num_read]
    position = StreamPosition.behind(before[-1]) if before else StreamPosition()
    after = read(output.chunks(then), position)
    assert_adds_up(before + after, output)
    logprobs = [logprob for chunk in before + after for logprob in chunk.logprobs or ()]
    assert tuple(logprobs) == output.result("a").logprobs


@settings(deadline=None)
@given(cuts=CUTS, offset=st.integers(0, NUM_TOKENS), num_chars=st.integers(0, 20))
def test_tokens_and_text_are_counted_apart(cuts: set[int], offset: int, num_chars: int) -> None:
    """A reader may have kept any two numbers: it gets the tokens and the text behind them."""
    output = KnownOutput(NUM_TOKENS)
    rest = read(output.chunks(cuts), StreamPosition(offset, min(num_chars, len(output.text))))
    assert sum((chunk.token_ids for chunk in rest), token_ids()) == output.token_ids[offset:]
    assert "".join(chunk.text for chunk in rest) == output.text[num_chars:]


def test_text_that_was_held_back_comes_without_tokens() -> None:
    chunk = Chunk(1, 4, token_ids([7]), "held back", 10)
    assert rest_of(chunk, StreamPosition(5, 10)) == Chunk(1, 5, token_ids(), "held back", 10)
    assert rest_of(chunk, StreamPosition(5, 19)) is None


def test_a_chunk_further_on_leaves_a_gap() -> None:
    chunk = KnownOutput(9).chunk(3, 6)
    assert not is_gap(chunk, StreamPosition(3, 3))
    assert is_gap(chunk, StreamPosition(2, 3))
    assert is_gap(chunk, StreamPosition(3, 2))


def test_a_position_counts_from_zero() -> None:
    with pytest.raises(ConfigError, match="-1"):
        StreamPosition(-1)
    assert StreamPosition(0, 0) == StreamPosition()
