"""A decoder's operations out of torch's own: for GPUs, and for CPUs that our kernels do not fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from cache.key_mixing import mix, mix_queries
from cache.pages import KVPages
from gpu_worker.attention.choice import choose_attention
from gpu_worker.layers.operations import (
    AttentionHeads,
    AttentionStep,
    Operations,
    Product,
)
from gpu_worker.layers.quantized import Int4Product, Int8Product
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.precision import Precision, Role
from gpu_worker.step_plan import StepPlan


def torch_operations(precision: Precision, device: torch.device) -> Operations:
    """The operations for `device`."""
    attention = choose_attention(device)

    def product(weight: Tensor, bias: Tensor | None, role: Role) -> Product:
        if bias is not None:
            bias = bias.to(device, precision.dtype)
        made: Product
        match precision.weight_bits(role):
            case 8:
                made = Int8Product(weight.to(device), bias, precision.dtype)
            case 4:
                made = Int4Product(weight.to(device), bias, precision.dtype)
            case None:
                made = TorchProduct(weight.to(device, precision.dtype, copy=True), bias)
        return GatedProduct(made) if role == "gate_up" else made

    def begin(plan: StepPlan, pages: KVPages, rotary: RotaryEmbedding) -> AttentionStep:
        def index(values: Tensor) -> Tensor:
            return values.to(device, torch.int64)

        paged_attention = attention(plan, pages)
        rotation = rotary(index(plan.positions), precision.dtype)
        slot_rows = pages.slot_rows(index(plan.slot_mapping))

        def attend(qkv: Tensor, layer: int, heads: AttentionHeads) -> Tensor:
            num_queries, num_kv = heads.heads.num_query_heads, heads.heads.num_kv_heads
            projected = qkv.view(len(qkv), -1, heads.head_dim)
            if heads.query_norm is not None and heads.key_norm is not None:
                query, key, value = torch.split(projected, [num_queries, num_kv, num_kv], dim=1)
                query = rotation.apply(_add_rms_norm(query, None, heads.query_norm, heads.eps))
                key = rotation.apply(_add_rms_norm(key, None, heads.key_norm, heads.eps))
            else:
                # Queries and keys lie side by side: one rotation serves both.
                query_key, value = torch.split(projected, [num_queries + num_kv, num_kv], dim=1)
                query, key = torch.split(rotation.apply(query_key), [num_queries, num_kv], dim=1)
            if pages.shape.format.mixes_keys:
                query, key = mix_queries(query), mix(key)
            layer_pages = pages.layer(layer)
            layer_pages.store(slot_rows, key, value)
            scale = heads.head_dim**-0.5
            return paged_attention(query, layer_pages, heads.heads, scale).flatten(1)

        return attend

    return Operations(precision.dtype, _add_rms_norm, product, begin)


@dataclass(frozen=True, slots=True)
class TorchProduct:
    """A plain matrix, (outputs, inputs), and a bias (outputs,) or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, values: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        return linear(values, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """silu of the first half of a product's columns, times the second half."""

    product: Product

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self.product.num_bytes

    def __call__(self, values: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, half of the outputs)."""
        gate, up = self.product(values).chunk(2, dim=-1)
        return silu(gate).mul_(up)


def _add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if delta is not None:
        hidden += delta
    return rms_norm(hidden, weight.shape, weight, eps)
