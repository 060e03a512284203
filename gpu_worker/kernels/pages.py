"""One layer's pages of the KV-cache as the kernels see them (`src/pages.h`)."""

from __future__ import annotations

import ctypes

from cache.page_formats import BFLOAT16, FLOAT16, FLOAT32, FP8, INT8, SCALE_DTYPE
from cache.pages import PageShape

_TYPES = {FLOAT32: 0, FLOAT16: 1, BFLOAT16: 2, FP8: 3, INT8: 4}
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
            "scale_block_stride",
            "scale_head_stride",
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
        _TYPES[shape.format],
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        shape.bytes_per_block // shape.format.dtype.itemsize,
        head,
        shape.bytes_per_block // SCALE_DTYPE.itemsize,
        shape.block_size,
    )
