"""Linear layers of which each tensor-parallel rank holds a part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.layers.operations import Product
from gpu_worker.tensor_parallel import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """This rank's outputs of a linear layer; inputs are whole on every rank.

    `product`: by (local outputs, inputs), several projections fused where they share their input.
    """

    product: Product

    def __call__(self, values: Tensor) -> Tensor:
        """(num_tokens, inputs) -> (num_tokens, local outputs)."""
        return self.product(values)


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """A linear layer whose inputs are spread over the ranks; outputs are whole on every rank.

    `product`: by (outputs, local inputs).
    """

    product: Product
    group: TensorParallelGroup

    def __call__(self, values: Tensor) -> Tensor:
        """(num_tokens, local inputs) -> (num_tokens, outputs), summed over the ranks."""
        return self.group.all_reduce(self.product(values))
