"""One layer's pages of the KV-cache as the kernels see them (`src/pages.h`)."""

from __future__ import annotations

import ctypes

import torch

from cache.pages import PageShape

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_HEAD_DIM = 256
"""What `src/rotary_avx512.cpp` has room for."""


class PagesStruct(ctypes.Structure):
    """`fb::Pages`: all but where the memory lies."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "type",
            "num_kv_heads",
            "head_dim",
            "block_size",
            "block_stride",
            "head_stride",
        )
    ]


def reason_against(head_dim: int) -> str | None:
    """Why the kernels cannot work on heads of `head_dim` elements; None if they can."""
    if head_dim % 2:
        return f"heads have {head_dim} elements; the kernels rotate pairs of them"
    if head_dim > _MAX_HEAD_DIM:
        return f"heads have {head_dim} elements; the kernels take up to {_MAX_HEAD_DIM}"
    return None


def describe(shape: PageShape) -> PagesStruct:
    """`shape` in the kernels' terms. There must be no reason against its heads."""
    assert reason_against(shape.head_dim) is None
    head = shape.block_size * shape.head_dim
    return PagesStruct(
        _TYPES[shape.dtype],
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        shape.num_layers * 2 * shape.num_kv_heads * head,
        head,
    )
