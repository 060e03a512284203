"""What a decoder is computed with: one set of operations per process, chosen when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cache.pages import KVPages
from gpu_worker.attention.interface import HeadMap
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.precision import Role
from gpu_worker.step_plan import StepPlan


class Product(Protocol):
    """A matrix ready to be multiplied by: values W^T + bias."""

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""

    def __call__(self, values: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """This rank's heads. `query_norm` and `key_norm` (head_dim,) act per head before the rotation
    (Qwen3), with `eps`; both are None elsewhere.
    """

    heads: HeadMap
    head_dim: int
    query_norm: Tensor | None
    key_norm: Tensor | None
    eps: float


class AttentionStep(Protocol):
    """Attention in one step of the model, prepared once for all layers."""

    def __call__(self, qkv: Tensor, layer: int, heads: AttentionHeads) -> Tensor:
        """(tokens, (query + 2 kv heads) * head_dim) -> (tokens, query heads * head_dim).

        Rotates queries and keys, writes the new keys and values into the pages of `layer`, and
        attends. `qkv` is the operation's to change.
        """


@dataclass(frozen=True, slots=True)
class Operations:
    """Activations are `activations` (a dtype) between all of them.

    `add_rms_norm(hidden, delta, weight, eps)` adds `delta`, unless it is None, to `hidden` in
    place, and returns the normalized sum, all (rows, features). `product(weight, bias, role)`
    makes the product by `weight` (outputs, inputs); for the role "gate_up" that is gates over ups,
    and the product is gated: silu(values gates^T) * (values ups^T).
    """

    activations: torch.dtype
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    product: Callable[[Tensor, Tensor | None, Role], Product]
    attention: Callable[[StepPlan, KVPages, RotaryEmbedding], AttentionStep]
