"""Normalization and residual sums, on contiguous float32 rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gpu_worker.kernels.library import FLOAT, INT64, POINTER, function


def rms_norm(values: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Scale rows (num_rows, n) to unit root mean square, then by `weight` (n,).

    Returns `out`, which may be `values` itself; a new tensor without one.
    """
    out = torch.empty_like(values) if out is None else out
    _check(values, weight, out)
    num_rows, n = values.shape
    _rms_norm()(values.data_ptr(), None, weight.data_ptr(), out.data_ptr(), num_rows, n, eps)
    return out


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Add `delta` to `residual` in place, and return the sum's rows normalized as by `rms_norm`.

    `residual`, `delta`, `out`: (num_rows, n); `out` may be `delta`.
    """
    out = torch.empty_like(residual) if out is None else out
    _check(residual, delta, weight, out)
    num_rows, n = residual.shape
    _rms_norm()(
        residual.data_ptr(),
        delta.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        n,
        eps,
    )
    return out


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


@cache
def _rms_norm() -> Callable[..., None]:
    return function("fb_rms_norm", POINTER, POINTER, POINTER, POINTER, INT64, INT64, FLOAT)
