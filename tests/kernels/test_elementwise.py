"""Normalization against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from gpu_worker.kernels import library
from gpu_worker.kernels.elementwise import add_rms_norm, rms_norm

pytestmark = pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")

SHAPES = ((1, 576), (7, 576), (300, 64), (2, 4096), (3, 1), (5, 17), (1, 40000))


def expected_norm(values: Tensor, weight: Tensor) -> Tensor:
    return torch_rms_norm(values.double(), weight.shape, weight.double(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_normalized(shape: tuple[int, int]) -> None:
    values, weight = torch.randn(shape), torch.randn(shape[1])
    found = rms_norm(values, weight, 1e-5)
    torch.testing.assert_close(found.double(), expected_norm(values, weight), rtol=1e-6, atol=1e-6)


def test_rows_are_normalized_in_place() -> None:
    values, weight = torch.randn(9, 100), torch.randn(100)
    expected = expected_norm(values, weight)
    assert rms_norm(values, weight, 1e-5, out=values) is values
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_delta_is_added_before_rows_are_normalized(
    shape: tuple[int, int], in_place: bool
) -> None:
    residual, delta, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    total = residual + delta
    found = add_rms_norm(residual, delta, weight, 1e-5, out=delta if in_place else None)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    torch.testing.assert_close(found.double(), expected_norm(total, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_with_bad_numbers_spoil_no_others(num_threads: int) -> None:
    library.set_num_threads(num_threads)
    values = torch.randn(200, 576)
    values[57, 3] = torch.nan
    bad = rms_norm(values, torch.ones(576), 1e-5).isnan().any(dim=1)
    library.set_num_threads(1)
    assert bad.nonzero().tolist() == [[57]]
