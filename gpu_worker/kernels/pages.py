"""One layer's pages of the KV-cache as the kernels see them (`src/pages.h`)."""

from __future__ import annotations

import ctypes

import torch

from cache.pages import PageShape

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_HEAD_DIM = 256


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


def supports(shape: PageShape) -> bool:
    """Whether the kernels can read and write such pages."""
    return shape.dtype in _TYPES and shape.head_dim % 2 == 0 and shape.head_dim <= MAX_HEAD_DIM


def describe(shape: PageShape) -> PagesStruct:
    """`shape`, which must be supported, in the kernels' terms."""
    assert supports(shape)
    head = shape.block_size * shape.head_dim
    return PagesStruct(
        _TYPES[shape.dtype],
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        shape.num_layers * 2 * shape.num_kv_heads * head,
        head,
    )
