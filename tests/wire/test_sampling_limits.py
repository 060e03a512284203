"""Each sampling parameter's range, at and beyond its ends."""

from __future__ import annotations

import math
from typing import Any

import pytest

from wire.errors import InvalidRequest
from wire.sampling import MAX_SEED, MAX_UINT32, SamplingParams

ALLOWED: list[tuple[str, list[Any]]] = [
    ("max_tokens", [None, 1, MAX_UINT32]),
    ("min_tokens", [0, 7]),
    ("temperature", [0.0, 1e-9, 100.0]),
    ("top_p", [1e-9, 1.0]),
    ("top_k", [None, 1, MAX_UINT32]),
    ("min_p", [0.0, 1.0]),
    ("seed", [None, 0, MAX_SEED, -MAX_SEED - 1]),
    ("presence_penalty", [-2.0, 2.0]),
    ("frequency_penalty", [-2.0, 2.0]),
    ("repetition_penalty", [1e-9, 100.0]),
    ("logprobs", [None, 0, 20]),
    ("stop", [(), ("x",), ("x" * 1024,) * 16]),
    ("stop_token_ids", [(), (0, MAX_UINT32), (1,) * 256]),
]
REFUSED: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -1, MAX_UINT32 + 1]),
    ("min_tokens", [-1]),
    ("temperature", [-0.1, 100.1, math.nan, math.inf, -math.inf]),
    ("top_p", [0.0, -0.5, 1.1, math.nan]),
    ("top_k", [0, -1]),
    ("min_p", [-0.1, 1.1, math.nan]),
    ("seed", [MAX_SEED + 1, -MAX_SEED - 2]),
    ("presence_penalty", [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2.1, 2.1, math.nan]),
    ("repetition_penalty", [0.0, -1.0, 100.1, math.nan, math.inf]),
    ("logprobs", [-1, 21]),
    ("stop", [("",), ("x" * 1025,), ("x",) * 17]),
    ("stop_token_ids", [(-1,), (MAX_UINT32 + 1,), (1,) * 257]),
]


def flat(table: list[tuple[str, list[Any]]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table for value in values]


@pytest.mark.parametrize(("name", "value"), flat(ALLOWED), ids=lambda v: str(v)[:12])
def test_a_value_within_its_range_is_taken(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), flat(REFUSED), ids=lambda v: str(v)[:12])
def test_a_value_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    if isinstance(value, (int, float)):
        assert f"{name} is {value}" in str(caught.value)


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(InvalidRequest, match="min_tokens is 4; it must be 0 to max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
