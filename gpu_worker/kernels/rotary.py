"""From the fused projection to rotated queries, and keys and values in their pages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cache.pages import LayerPages, PageShape
from gpu_worker.kernels.library import POINTER, function
from gpu_worker.kernels.pages import PagesStruct, describe


class _Rotation(ctypes.Structure):
    """`fb::Rotation`."""

    _fields_ = [
        ("pages", PagesStruct),
        ("num_query_heads", ctypes.c_int64),
        ("qkv", POINTER),
        ("num_tokens", ctypes.c_int64),
        ("cos", POINTER),
        ("sin", POINTER),
        ("slots", POINTER),
        ("keys", POINTER),
        ("values", POINTER),
        ("key_scales", POINTER),
        ("value_scales", POINTER),
        ("query_norm", POINTER),
        ("key_norm", POINTER),
        ("eps", ctypes.c_float),
    ]


class RotateAndStore:
    """One step's rotation and slots, to be applied to every layer's heads."""

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        shape: PageShape,
        num_query_heads: int,
    ) -> None:
        """Prepare for tokens of these angles and slots.

        `cos` and `sin`: float32, head_dim / 2 of each token, contiguous. `slot_mapping`:
        (num_tokens,) int32, block_id * block_size + offset.
        """
        num_tokens = len(slot_mapping)
        assert slot_mapping.dtype == torch.int32
        assert slot_mapping.is_contiguous()
        for angles in (cos, sin):
            assert angles.dtype == torch.float32
            assert angles.is_contiguous()
            assert angles.numel() == num_tokens * shape.head_dim // 2
        self._kept = (cos, sin, slot_mapping)  # the kernel reads their memory
        self._row_len = (num_query_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self._num_tokens = num_tokens
        self._call = _Rotation(
            pages=describe(shape),
            num_query_heads=num_query_heads,
            num_tokens=num_tokens,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=slot_mapping.data_ptr(),
        )
        self._address = ctypes.addressof(self._call)
        self._kernel = _rotate_and_store()

    def __call__(
        self,
        qkv: Tensor,
        pages: LayerPages,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotate the queries of `qkv` in place, and write its keys, rotated, and values to `pages`.

        `qkv`: (num_tokens, (query heads + 2 * kv heads) * head_dim) float32, contiguous: queries,
        keys, values. Element i of a head turns with element i + head_dim / 2. With `query_norm`
        and `key_norm` (head_dim,), each head of queries and keys is normalized to unit root mean
        square (and `eps`) and multiplied by them before. Keys in `qkv` stay as they are.
        """
        assert qkv.dtype == torch.float32
        assert qkv.is_contiguous()
        assert qkv.numel() == self._num_tokens * self._row_len
        call = self._call
        call.qkv = qkv.data_ptr()
        call.keys, call.values, call.key_scales, call.value_scales = pages.addresses
        call.query_norm = None if query_norm is None else query_norm.data_ptr()
        call.key_norm = None if key_norm is None else key_norm.data_ptr()
        call.eps = eps
        self._kernel(self._address)


@cache
def _rotate_and_store() -> Callable[..., None]:
    return function("fb_rotate_and_store", POINTER)
