"""Root-mean-square normalization (arXiv 1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.layers.operations import Operations


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Scales the last dimension to unit root mean square, then by `weight` (features,)."""

    weight: Tensor
    eps: float
    operations: Operations

    def __call__(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to the residual stream `hidden`, in place, and return that normalized.

        All are (num_tokens, hidden).
        """
        return self.operations.add_rms_norm(hidden, delta, self.weight, self.eps)
