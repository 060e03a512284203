"""The largest value of each row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gpu_worker.kernels.library import INT64, POINTER, function


def argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest values of each row, and which one it is.

    `values`: (num_rows, n) float32, contiguous. Returns ids (num_rows,) int64, as torch.argmax,
    and the values (num_rows,) float32: a NaN for a row that holds one.
    """
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    num_rows, n = values.shape
    assert n > 0
    ids = torch.empty(num_rows, dtype=torch.int64)
    largest = torch.empty(num_rows)
    _argmax()(values.data_ptr(), num_rows, n, ids.data_ptr(), largest.data_ptr())
    return ids, largest


@cache
def _argmax() -> Callable[..., None]:
    return function("fb_argmax", POINTER, INT64, INT64, POINTER, POINTER)
