"""Drawing one token for each row of logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gpu_worker.kernels.library import INT64, POINTER, function


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Filter each row by min-p, then top-k, then top-p, and draw from what is left.

    `logits`: (rows, vocab) float32, contiguous, overwritten. All others (rows,): `temperature`
    float32 above 0; `top_k` int64, the vocabulary's size for none; `top_p` float32, 1 for none;
    `min_p` float32, 0 for none; `shares` float64 strictly between 0 and 1. The token is the one at
    which the cumulative weight in the order of token ids first exceeds that share of the total.

    Returns tokens (rows,) int64, and the highest logits (rows,) float32, a NaN for a row that holds
    one; where that is not finite, the token is 0.
    """
    assert logits.dtype == temperature.dtype == top_p.dtype == min_p.dtype == torch.float32
    assert top_k.dtype == torch.int64
    assert shares.dtype == torch.float64
    assert logits.is_contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    best = torch.empty(num_rows)
    _draw()(
        logits.data_ptr(),
        num_rows,
        vocab_size,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        shares.data_ptr(),
        tokens.data_ptr(),
        best.data_ptr(),
    )
    return tokens, best


@cache
def _draw() -> Callable[..., None]:
    return function("fb_draw", POINTER, INT64, INT64, *[POINTER] * 7)
