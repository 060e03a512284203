"""The largest value of each row, as torch finds it."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.kernels import library
from gpu_worker.kernels.argmax import argmax

pytestmark = pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")

SHAPES = ((1, 1), (1, 49152), (3, 151_936), (130, 1000), (2, 17), (9, 8193), (0, 5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_largest_value_is_found(shape: tuple[int, int], num_threads: int) -> None:
    library.set_num_threads(num_threads)
    values = torch.randn(shape)
    ids, largest = argmax(values)
    library.set_num_threads(1)
    assert torch.equal(ids, values.argmax(dim=1))
    assert torch.equal(largest, values.amax(dim=1))


@pytest.mark.parametrize("width", [5, 100, 49152])
def test_the_first_of_several_is_taken(width: int) -> None:
    values = torch.randint(0, 3, (40, width)).float()
    expected = [row.index(max(row)) for row in values.tolist()]
    assert argmax(values)[0].tolist() == expected


def test_a_row_may_be_negative_infinity_throughout() -> None:
    ids, largest = argmax(torch.full((2, 20_000), -torch.inf))
    assert ids.tolist() == [0, 0]
    assert largest.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("place", [0, 77, 20_000, 49_151])
def test_a_row_with_a_nan_has_a_nan_for_its_largest_value(place: int) -> None:
    values = torch.randn(3, 49_152)
    values[1, place] = torch.nan
    values[1, 5] = torch.inf
    ids, largest = argmax(values)
    assert largest.isnan().tolist() == [False, True, False]
    assert torch.equal(ids, values.argmax(dim=1))
