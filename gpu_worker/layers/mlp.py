"""The gated feed-forward block (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import silu

from gpu_worker.layers.linear import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), with gate and up fused into one product."""

    gate_up: ColumnParallelLinear
    down: RowParallelLinear

    def __call__(self, values: Tensor) -> Tensor:
        """(num_tokens, hidden) -> (num_tokens, hidden)."""
        gate, up = self.gate_up(values).chunk(2, dim=-1)
        return self.down(silu(gate).mul_(up))
