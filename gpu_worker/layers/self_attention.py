"""Grouped-query self-attention over the paged KV-cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.pages import LayerPages
from gpu_worker.attention.interface import HeadMap, PagedAttention
from gpu_worker.layers.linear import ColumnParallelLinear, RowParallelLinear
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.rotary import Rotation


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """This rank's heads. `query_norm` and `key_norm` (Qwen3) act per head, before the rotation."""

    qkv: ColumnParallelLinear
    output: RowParallelLinear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    heads: HeadMap
    head_dim: int

    def __call__(
        self,
        values: Tensor,
        rotation: Rotation,
        slot_rows: Tensor,
        pages: LayerPages,
        paged_attention: PagedAttention,
    ) -> Tensor:
        """(num_tokens, hidden) -> (num_tokens, hidden); the new keys and values enter `pages`."""
        num_queries, num_kv = self.heads.num_query_heads, self.heads.num_kv_heads
        projected = self.qkv(values).view(len(values), -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = torch.split(projected, [num_queries, num_kv, num_kv], dim=1)
            query = rotation.apply(self.query_norm(query))
            key = rotation.apply(self.key_norm(key))
        else:
            # Queries and keys lie side by side: one rotation serves both.
            query_key, value = torch.split(projected, [num_queries + num_kv, num_kv], dim=1)
            query, key = torch.split(rotation.apply(query_key), [num_queries, num_kv], dim=1)
        pages.store(slot_rows, key, value)
        attended = paged_attention(query, pages, self.heads, self.head_dim**-0.5)
        return self.output(attended.flatten(1))
