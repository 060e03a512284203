"""The scaling model's arithmetic, at ends where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.collectives import SHARED, Measured
from benchmarks.scaling_model import (
    H100,
    LLAMA_8B,
    LLAMA_70B,
    SIZES,
    Load,
    all_reduce_s,
    fits,
    predict,
)

DECODE = Load("decode", 1, 1, 1)
PREFILL = Load("prefill", 8, 512, 512)
FREE_EXCHANGES = replace(H100, all_reduce_latency_s=0.0, link_bytes_per_s=float("inf"))


def test_the_shapes_have_the_parameters_of_their_names() -> None:
    assert LLAMA_8B.weight_bytes == pytest.approx(2 * 8.03e9, rel=0.01)
    assert LLAMA_70B.weight_bytes == pytest.approx(2 * 70.6e9, rel=0.01)


def test_a_single_decode_reads_the_weights_once() -> None:
    embedding_bytes = 2 * 4096 * 128256  # of which only a row is looked up
    step = predict(LLAMA_8B, H100, DECODE, 1)
    expected_s = (LLAMA_8B.weight_bytes - embedding_bytes) / H100.memory_bytes_per_s
    assert step.linear_s == pytest.approx(expected_s)


@pytest.mark.parametrize("load", [DECODE, PREFILL])
def test_without_exchanges_only_what_every_rank_repeats_does_not_scale(load: Load) -> None:
    alone = predict(LLAMA_8B, FREE_EXCHANGES, load, 1)
    for size in SIZES:
        step = predict(LLAMA_8B, FREE_EXCHANGES, load, size)
        assert step.linear_s == pytest.approx(alone.linear_s / size)
        assert step.attention_s == pytest.approx(alone.attention_s / size)
        assert step.elementwise_s == alone.elementwise_s


def test_more_ranks_than_key_value_heads_hold_one_each() -> None:
    eight = predict(LLAMA_8B, FREE_EXCHANGES, Load("decode", 32, 1, 1000), 8)
    sixteen = predict(LLAMA_8B, FREE_EXCHANGES, Load("decode", 32, 1, 1000), 16)
    assert sixteen.attention_s == eight.attention_s


def test_an_all_reduce_costs_its_latency_and_its_bytes() -> None:
    assert all_reduce_s(H100, 1e6, 1) == 0
    assert all_reduce_s(H100, 0, 4) == H100.all_reduce_latency_s
    per_byte_s = 1 / H100.link_bytes_per_s
    moved_s = all_reduce_s(H100, 1e6, 8) - H100.all_reduce_latency_s
    assert moved_s == pytest.approx(1.75e6 * per_byte_s)


def test_70b_in_16_bits_needs_two_gpus() -> None:
    assert [fits(LLAMA_70B, H100, DECODE, size) for size in SIZES] == [False, True, True, True]


def test_the_line_through_measured_exchanges_is_found_again() -> None:
    seconds = {count: 5e-6 + 4 * count / 8e9 for count in (1, 1000, 100_000)}
    cost = Measured({SHARED: seconds}, {}).cost()
    assert cost.latency_s == pytest.approx(5e-6)
    assert cost.bytes_per_s == pytest.approx(8e9)
    assert cost.seconds(8e6) == pytest.approx(1.005e-3)
