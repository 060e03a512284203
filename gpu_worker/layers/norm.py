"""Root-mean-square normalization (arXiv 1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import rms_norm


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Scales the last dimension to unit root mean square, then by `weight` (features,)."""

    weight: Tensor
    eps: float

    def __call__(self, values: Tensor) -> Tensor:
        """(..., features) -> (..., features)."""
        return rms_norm(values, self.weight.shape, self.weight, self.eps)
