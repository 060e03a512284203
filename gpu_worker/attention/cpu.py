"""Paged attention for CPUs, out of plain torch operations on a few large operands.

Decoding sequences are sorted by length and cut into groups whose gathered keys and values fit
the second-level cache: within a group all are padded to the longest, which sorting keeps small,
and the gathered copy is read again before it leaves the cache. Prefill chunks go one sequence at
a time; they are large enough by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cache.pages import KVPages, LayerPages, PageRows
from gpu_worker.attention.interface import HeadMap
from gpu_worker.step_plan import StepPlan

_GROUP_SLOTS = 2048
"""Gathered slots (padding included) per decode group: 2048 slots of 3 heads of 64 float32 are
1.5 MB of keys."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token each, attended together.

    `rows` (n,) int64: their rows in the step. `block_rows`: where their blocks lie, padded to the
    longest. `bias` (n, 1, 1, slots): 0 where a slot belongs to the sequence, -inf beyond; None if
    all are full.
    """

    rows: Tensor
    block_rows: PageRows
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    """Several new tokens of one sequence. `visible` (new, context) bool; None if all are new."""

    rows: slice
    block_rows: PageRows
    context_len: int
    visible: Tensor | None


class CpuAttention:
    """One step's attention; see the module for how it is cut up."""

    def __init__(self, plan: StepPlan, pages: KVPages) -> None:
        """Cut the step into decode groups and prefill chunks."""
        block_size = pages.shape.block_size
        context_lens = plan.context_lens.tolist()
        starts = plan.query_starts.tolist()
        decodes: list[int] = []
        self._prefills: list[_PrefillChunk] = []
        for seq, context_len in enumerate(context_lens):
            num_new = starts[seq + 1] - starts[seq]
            if num_new == 1:
                decodes.append(seq)
                continue
            num_blocks = -(-context_len // block_size)
            self._prefills.append(
                _PrefillChunk(
                    rows=slice(starts[seq], starts[seq + 1]),
                    block_rows=pages.block_rows(plan.block_tables[seq, :num_blocks]),
                    context_len=context_len,
                    visible=_causal_mask(num_new, context_len),
                )
            )
        decodes.sort(key=lambda seq: context_lens[seq])
        num_blocks_of = [-(-length // block_size) for length in context_lens]
        self._decodes = [
            _decode_group(plan, pages, group, num_blocks_of[group[-1]])
            for group in _cut_groups(decodes, num_blocks_of, _GROUP_SLOTS // block_size)
        ]

    def __call__(self, query: Tensor, pages: LayerPages, heads: HeadMap, scale: float) -> Tensor:
        """See `PagedAttention`."""
        output = torch.empty_like(query)
        for group in self._decodes:
            output[group.rows] = _decode(query[group.rows], pages, heads, scale, group)
        for chunk in self._prefills:
            output[chunk.rows] = _prefill(query[chunk.rows], pages, heads, scale, chunk)
        return output


def _decode(
    query: Tensor, pages: LayerPages, heads: HeadMap, scale: float, group: _DecodeGroup
) -> Tensor:
    """`query`: (n, query_heads, head_dim), one token of each sequence of the group."""
    keys, values = pages.read(group.block_rows, query.dtype)
    by_sequence = (heads.num_kv_heads, len(query), -1, query.shape[-1])
    bias = None if group.bias is None else group.bias.to(query.dtype)
    # The query heads that share a key/value head stand where query positions usually do, so the
    # keys and values are read once for all of them.
    grouped = scaled_dot_product_attention(
        heads.group_queries(query),
        keys.view(by_sequence).transpose(0, 1),
        values.view(by_sequence).transpose(0, 1),
        attn_mask=bias,
        scale=scale,
    )
    return heads.ungroup(grouped)


def _prefill(
    query: Tensor, pages: LayerPages, heads: HeadMap, scale: float, chunk: _PrefillChunk
) -> Tensor:
    """`query`: (new tokens, query_heads, head_dim) of one sequence."""
    keys, values = pages.read(chunk.block_rows, query.dtype)
    grouped = heads.group_queries(query).permute(1, 2, 0, 3)
    shared = (heads.num_kv_heads, grouped.shape[1], chunk.context_len, query.shape[-1])
    attended = scaled_dot_product_attention(
        grouped,
        keys[:, None, : chunk.context_len].expand(shared),
        values[:, None, : chunk.context_len].expand(shared),
        attn_mask=chunk.visible,
        is_causal=chunk.visible is None,
        scale=scale,
    )
    return heads.ungroup(attended.permute(2, 0, 1, 3))


def _causal_mask(num_new: int, context_len: int) -> Tensor | None:
    if num_new == context_len:
        return None
    return torch.ones(num_new, context_len, dtype=torch.bool).tril(context_len - num_new)


def _cut_groups(sequences: list[int], num_blocks_of: list[int], max_blocks: int) -> list[list[int]]:
    """Cut `sequences`, sorted by length, so that each group times its longest fits `max_blocks`."""
    groups: list[list[int]] = []
    for seq in sequences:
        if groups and (len(groups[-1]) + 1) * num_blocks_of[seq] <= max_blocks:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    return groups


def _decode_group(
    plan: StepPlan, pages: KVPages, group: list[int], num_blocks: int
) -> _DecodeGroup:
    sequences = torch.tensor(group, dtype=torch.int64)
    context_lens = plan.context_lens[sequences]
    num_slots = num_blocks * pages.shape.block_size
    tables = plan.block_tables[sequences, :num_blocks]
    bias = None
    if int(context_lens[0]) < num_slots:
        beyond = torch.arange(num_slots) >= context_lens[:, None]
        bias = torch.zeros(len(group), 1, 1, num_slots)
        bias.masked_fill_(beyond[:, None, None, :], -torch.inf)
        # A masked slot's weight is 0, and 0 times NaN is NaN: what is read beyond a sequence's end
        # must be its own, so that a neighbour whose numbers went bad does not spoil it.
        tables = torch.where(beyond[:, :: pages.shape.block_size], tables[:, :1], tables)
    return _DecodeGroup(
        rows=plan.query_starts[sequences].long(),
        block_rows=pages.block_rows(tables.flatten()),
        bias=bias,
    )
