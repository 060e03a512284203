"""Paged attention: a step cut into items for all layers, and the call for one layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.pages import LayerPages, PageShape
from gpu_worker.kernels.library import POINTER, function
from gpu_worker.kernels.pages import PagesStruct, describe

_INT64 = ctypes.c_int64
_ITEM_LEN = 6
"""int32 numbers in an `fb::AttentionItem`."""


class _Step(ctypes.Structure):
    """`fb::Step`: what is planned for."""

    _fields_ = [
        ("query_starts", POINTER),
        ("context_lens", POINTER),
        ("block_tables", POINTER),
        ("table_stride", _INT64),
        ("num_seqs", _INT64),
        ("block_size", _INT64),
        ("rows_per_token", _INT64),
        ("num_kv_heads", _INT64),
        ("order", POINTER),
        ("max_items", _INT64),
        ("max_entries", _INT64),
        ("max_parts", _INT64),
    ]


class _Work(ctypes.Structure):
    """`fb::AttentionWork`: the plan."""

    _fields_ = [
        ("num_items", _INT64),
        ("num_entries", _INT64),
        ("num_parts", _INT64),
        ("items", POINTER),
        ("tokens", POINTER),
        ("limits", POINTER),
        ("next_part", POINTER),
        ("last_part", POINTER),
        ("part_count", POINTER),
    ]


class _Attention(ctypes.Structure):
    """`fb::Attention`: one layer's call."""

    _fields_ = [
        ("pages", PagesStruct),
        ("num_query_heads", _INT64),
        ("query_begin", POINTER),
        ("block_tables", POINTER),
        ("table_stride", _INT64),
        ("work", POINTER),
        ("parts", POINTER),
        ("part_stats", POINTER),
        ("arrived", POINTER),
        ("scale", ctypes.c_float),
        ("out", POINTER),
        ("query", POINTER),
        ("query_stride", _INT64),
        ("keys", POINTER),
        ("values", POINTER),
        ("key_scales", POINTER),
        ("value_scales", POINTER),
    ]


class AttentionMemory:
    """Arrays that the kernels work in. They grow as needed and serve one step after the other."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._arrays: dict[str, NDArray[np.int32]] = {}

    def length(self, name: str) -> int:
        """Elements that the array called `name` has so far."""
        return len(self._arrays[name]) if name in self._arrays else 0

    def reserve(self, name: str, length: int) -> int:
        """The address of at least `length` elements of 32 bits; zeros while they are new."""
        if name not in self._arrays or self.length(name) < length:
            self._arrays[name] = np.zeros(max(length, 2 * self.length(name)), dtype=np.int32)
        return self._arrays[name].ctypes.data


class Sequences(Protocol):
    """The sequences of a step. Tensors are int32, contiguous, on the CPU."""

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""

    @property
    def num_seqs(self) -> int:
        """Sequences."""

    @property
    def query_starts(self) -> Tensor:
        """The first row of each sequence, then `num_tokens`."""

    @property
    def context_lens(self) -> Tensor:
        """Tokens of each in the cache after the step."""

    @property
    def block_tables(self) -> Tensor:
        """(num_seqs, most blocks of one)."""


class PlannedAttention:
    """One step's attention over pages of one shape, for one map of heads."""

    def __init__(
        self,
        plan: Sequences,
        shape: PageShape,
        kv_head_of_query: tuple[int, ...],
        memory: AttentionMemory,
    ) -> None:
        """Cut the step into items. `memory` is this object's until the next one is made with it.

        `kv_head_of_query` names the key/value head that each query head reads; it must not
        decrease.
        """
        for indices in (plan.query_starts, plan.context_lens, plan.block_tables):
            assert indices.dtype == torch.int32
            assert indices.is_contiguous()
        num_query_heads = len(kv_head_of_query)
        groups = np.bincount(kv_head_of_query, minlength=shape.num_kv_heads)
        self._query_begin = np.concatenate(([0], groups.cumsum())).astype(np.int32)
        self._kept = plan  # the kernels read its memory
        self._work = _plan(plan, shape, int(groups.max()), memory)
        num_rows = self._work.num_parts * num_query_heads
        self._call = _Attention(
            pages=describe(shape),
            num_query_heads=num_query_heads,
            query_begin=self._query_begin.ctypes.data,
            block_tables=plan.block_tables.data_ptr(),
            table_stride=plan.block_tables.shape[1],
            work=ctypes.addressof(self._work),
            parts=memory.reserve("parts", num_rows * shape.head_dim),
            part_stats=memory.reserve("part_stats", 2 * num_rows),
            arrived=memory.reserve("arrived", plan.num_tokens * shape.num_kv_heads),
        )
        self._query_shape = (plan.num_tokens, num_query_heads, shape.head_dim)
        self._address = ctypes.addressof(self._call)
        self._kernel = _attend()

    @property
    def num_items(self) -> int:
        """Items that each key/value head's work is cut into."""
        return int(self._work.num_items)

    def __call__(self, query: Tensor, pages: LayerPages, scale: float) -> Tensor:
        """See `PagedAttention`. Rows of `query` may stand apart, as in the fused projection."""
        assert query.dtype == torch.float32
        assert query.shape == self._query_shape
        assert query.stride()[1:] == (query.shape[2], 1)
        output = torch.empty(self._query_shape)
        call = self._call
        call.scale = scale
        call.out = output.data_ptr()
        call.query = query.data_ptr()
        call.query_stride = query.stride(0)
        call.keys, call.values, call.key_scales, call.value_scales = pages.addresses
        self._kernel(self._address)
        return output


def _plan(plan: Sequences, shape: PageShape, rows_per_token: int, memory: AttentionMemory) -> _Work:
    step = _Step(
        query_starts=plan.query_starts.data_ptr(),
        context_lens=plan.context_lens.data_ptr(),
        block_tables=plan.block_tables.data_ptr(),
        table_stride=plan.block_tables.shape[1],
        num_seqs=plan.num_seqs,
        block_size=shape.block_size,
        rows_per_token=rows_per_token,
        num_kv_heads=shape.num_kv_heads,
        order=memory.reserve("order", plan.num_seqs),
    )
    work = _Work(
        last_part=memory.reserve("last_part", plan.num_tokens),
        part_count=memory.reserve("part_count", plan.num_tokens),
    )
    # A guess at first; what was not enough is counted nevertheless.
    work.num_items, work.num_entries, work.num_parts = plan.num_seqs, 2 * plan.num_tokens, 0
    while True:
        work.items = memory.reserve("items", work.num_items * _ITEM_LEN)
        work.tokens = memory.reserve("tokens", work.num_entries)
        work.limits = memory.reserve("limits", work.num_entries)
        work.next_part = memory.reserve("next_part", work.num_parts)
        step.max_items = memory.length("items") // _ITEM_LEN
        step.max_entries = memory.length("limits")
        step.max_parts = memory.length("next_part")
        _plan_attention()(ctypes.addressof(step), ctypes.addressof(work))
        if (
            work.num_items <= step.max_items
            and work.num_entries <= step.max_entries
            and work.num_parts <= step.max_parts
        ):
            return work


@cache
def _plan_attention() -> Callable[..., None]:
    return function("fb_plan_attention", POINTER, POINTER)


@cache
def _attend() -> Callable[..., None]:
    return function("fb_attend", POINTER)
