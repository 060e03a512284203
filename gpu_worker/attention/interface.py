"""The signature that every paged-attention implementation has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from cache.pages import KVPages, LayerPages
from gpu_worker.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class HeadMap:
    """Which local key/value head each local query head reads, in both directions.

    Under uneven sharding a key/value head may serve fewer query heads than its neighbour. For
    batched products `padded_queries` (num_kv_heads, widest group) lists each one's query heads,
    the last one repeated to fill up, and `padded_index` (num_query_heads,) says where in that
    flattened table each query head stands. `even` tells that nothing was filled up, and hence
    that the table counts 0, 1, 2, ...
    """

    kv_head_of_query: tuple[int, ...]
    num_kv_heads: int
    padded_queries: Tensor
    padded_index: Tensor
    even: bool

    @property
    def num_query_heads(self) -> int:
        """Query heads of this rank."""
        return len(self.kv_head_of_query)

    @classmethod
    def build(cls, kv_head_of_query: tuple[int, ...], device: torch.device) -> HeadMap:
        """Lay out the table for `kv_head_of_query`, which must not decrease."""
        num_kv_heads = kv_head_of_query[-1] + 1
        groups: list[list[int]] = [[] for _ in range(num_kv_heads)]
        for query_head, kv_head in enumerate(kv_head_of_query):
            groups[kv_head].append(query_head)
        widest = max(map(len, groups))
        padded = [group + group[-1:] * (widest - len(group)) for group in groups]
        index = [kv * widest + at for kv, group in enumerate(groups) for at in range(len(group))]
        return cls(
            kv_head_of_query=kv_head_of_query,
            num_kv_heads=num_kv_heads,
            padded_queries=torch.tensor(padded, dtype=torch.int64, device=device),
            padded_index=torch.tensor(index, dtype=torch.int64, device=device),
            even=all(len(group) == widest for group in groups),
        )

    def group_queries(self, query: Tensor) -> Tensor:
        """(tokens, query_heads, head_dim) -> (tokens, kv_heads, widest group, head_dim)."""
        if not self.even:
            query = query.index_select(1, self.padded_queries.flatten())
        return query.reshape(len(query), *self.padded_queries.shape, query.shape[-1])

    def ungroup(self, grouped: Tensor) -> Tensor:
        """(tokens, kv_heads, widest group, head_dim) -> (tokens, query_heads, head_dim)."""
        flat = grouped.flatten(1, 2)
        return flat if self.even else flat.index_select(1, self.padded_index)


class PagedAttention(Protocol):
    """Attention of one step's tokens over all that their sequences have in the cache."""

    def __call__(self, query: Tensor, pages: LayerPages, heads: HeadMap, scale: float) -> Tensor:
        """Causal softmax attention for one layer.

        `query` and the result: (num_tokens, query_heads, head_dim) in one dtype. The step's own
        keys and values are already in `pages`. `scale` multiplies the scores.
        """


AttentionBackend: TypeAlias = Callable[[StepPlan, KVPages], PagedAttention]
"""Prepares one step for all layers: called with the plan and the pages that it will read."""
