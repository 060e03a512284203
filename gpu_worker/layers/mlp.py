"""The gated feed-forward block (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.layers.linear import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)); `gate_up` is one product, and ends with the gating."""

    gate_up: ColumnParallelLinear
    down: RowParallelLinear

    def __call__(self, values: Tensor) -> Tensor:
        """(num_tokens, hidden) -> (num_tokens, hidden)."""
        return self.down(self.gate_up(values))
