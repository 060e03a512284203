"""Every head of every block is asked for once, of a rank that holds it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.transfer.failures import TransferFailed
from cache.transfer.messages import RankSource
from cache.transfer.planning import RUN_BYTES, divide_heads, runs
from support.transfer_groups import SHARDS


def sources(shards: Sequence[range]) -> list[RankSource]:
    return [RankSource("", heads.start, len(heads)) for heads in shards]


@st.composite
def covering_shards(draw: st.DrawFn) -> list[range]:
    """Ranges in order which may overlap, and together hold heads from 0 on."""
    shards, end = [], 0
    for _ in range(draw(st.integers(1, 9))):
        start = draw(st.integers(max(0, end - 2), end))
        end = max(end, start + draw(st.integers(1, 4)))
        shards.append(range(start, end))
    return shards


@settings(max_examples=100, deadline=None)
@given(shards=covering_shards(), data=st.data())
def test_each_wanted_head_is_asked_for_once(shards: list[range], data: st.DataObject) -> None:
    num_heads = max(heads.stop for heads in shards)
    first = data.draw(st.integers(0, num_heads - 1))
    wanted = range(first, data.draw(st.integers(first + 1, num_heads)))
    rank = data.draw(st.integers(0, 20))
    shares = divide_heads(wanted, sources(shards), rank)
    assert sorted(head for heads in shares.values() for head in heads) == list(wanted)
    assert all(head in shards[source] for source, heads in shares.items() for head in heads)


@pytest.mark.parametrize(
    ("exporter", "importer", "expected"),
    [
        (2, 3, [{0: [0]}, {1: [1]}, {1: [2]}]),
        (3, 2, [{0: [0], 1: [1]}, {1: [1], 2: [2]}]),
        (2, 1, [{0: [0, 1], 1: [2]}]),
    ],
)
def test_between_known_sizes(
    exporter: int, importer: int, expected: list[dict[int, list[int]]]
) -> None:
    asked = [
        divide_heads(wanted, sources(SHARDS[exporter]), rank)
        for rank, wanted in enumerate(SHARDS[importer])
    ]
    in_order = [{source: sorted(heads) for source, heads in share.items()} for share in asked]
    assert in_order == expected


def test_ranks_that_want_the_same_head_turn_to_different_copies() -> None:
    everything = sources([range(3)] * 3)
    asked = [divide_heads(range(0, 1), everything, rank) for rank in range(3)]
    assert asked == [{0: [0]}, {1: [0]}, {2: [0]}]


def test_a_head_that_nobody_holds_cannot_be_had() -> None:
    with pytest.raises(TransferFailed, match="head 2"):
        divide_heads(range(3), sources([range(0, 2), range(3, 4)]), 0)


@given(
    num_blocks=st.integers(1, 300),
    heads=st.lists(st.integers(0, 9), min_size=1, unique=True),
    piece_bytes=st.integers(1, 3 * RUN_BYTES),
)
def test_runs_hold_every_piece_once_and_are_small(
    num_blocks: int, heads: list[int], piece_bytes: int
) -> None:
    pieces = []
    for run in runs(num_blocks, heads, piece_bytes):
        assert run.num_blocks == 1 or run.num_blocks * piece_bytes <= RUN_BYTES
        pieces += [(run.head, block) for block in range(num_blocks)[run.blocks]]
    assert pieces == [(head, block) for head in heads for block in range(num_blocks)]
