"""Grouped-query self-attention over the paged KV-cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.layers.linear import ColumnParallelLinear, RowParallelLinear
from gpu_worker.layers.operations import AttentionHeads, AttentionStep


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """This rank's heads of layer `index`."""

    index: int
    qkv: ColumnParallelLinear
    output: RowParallelLinear
    heads: AttentionHeads

    def __call__(self, values: Tensor, attention: AttentionStep) -> Tensor:
        """(num_tokens, hidden) -> (num_tokens, hidden); the new keys and values enter the pages."""
        return self.output(attention(self.qkv(values), self.index, self.heads))
