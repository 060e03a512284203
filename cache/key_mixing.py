"""Mixing keys before they are rounded, so that no channel of a head outgrows the others.

    q . k = (H q) . (H k) / n        H: the Walsh-Hadamard matrix of n, H H = n

Keys of most models have channels that are always large, which coarse steps for the whole row then
follow. Mixed, an outlier is spread over n channels. There is nothing to calibrate and nothing to
keep: queries are mixed as they come, and attention itself knows of nothing (QuaRot, arXiv
2404.00456, rotates weights and keys in this way; `docs/KV_CACHE.md` has what it is worth here).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LEN = 64


def mixed_len(head_dim: int) -> int:
    """How many channels are mixed with each other: the greatest power of two up to 64 that fits."""
    return min(head_dim & -head_dim, _MAX_LEN)


def mix(heads: Tensor) -> Tensor:
    """H times each run of `mixed_len` channels: (..., head_dim) -> (..., head_dim) float32.

    Only sums and differences, in the order in which our kernels make them: the bits are the same.
    """
    head_dim = heads.shape[-1]
    mixed, stride = heads.float(), 1
    while stride < mixed_len(head_dim):
        low, high = mixed.reshape(*heads.shape[:-1], -1, 2, stride).unbind(-2)
        mixed = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return mixed


def mix_queries(heads: Tensor) -> Tensor:
    """The queries for keys that were mixed, in their own dtype."""
    return (mix(heads) / mixed_len(heads.shape[-1])).to(heads.dtype)
