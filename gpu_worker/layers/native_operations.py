"""A decoder's operations out of our CPU kernels: float32 activations throughout."""

from __future__ import annotations

import torch
from torch import Tensor

from cache.pages import KVPages
from gpu_worker.attention.native import NativeAttention
from gpu_worker.kernels.elementwise import add_rms_norm, rms_norm
from gpu_worker.kernels.linear import Layout, PackedLinear, WeightFormat
from gpu_worker.kernels.rotary import RotateAndStore
from gpu_worker.layers.operations import AttentionHeads, AttentionStep, Operations
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.precision import Precision, Role
from gpu_worker.step_plan import StepPlan


def native_operations(precision: Precision) -> Operations:
    """The operations for weights and pages of `precision`."""
    attention = NativeAttention()

    def product(weight: Tensor, bias: Tensor | None, role: Role) -> PackedLinear:
        return PackedLinear(weight, weight_format(precision, role), bias, gated=role == "gate_up")

    def begin(plan: StepPlan, pages: KVPages, rotary: RotaryEmbedding) -> AttentionStep:
        return _NativeAttentionStep(attention, plan, pages, rotary)

    return Operations(torch.float32, _add_rms_norm, product, begin)


def weight_format(precision: Precision, role: Role) -> WeightFormat:
    """How the matrices of `role` are packed."""
    match precision.weight_bits(role):
        case 8:
            return WeightFormat(Layout.INT8_GROUPS)
        case 4:
            return WeightFormat(Layout.INT4_GROUPS)
    if precision.dtype == torch.float32:
        return WeightFormat(Layout.FLOAT32_PANELS)
    if precision.dtype == torch.bfloat16:
        if precision.isa == "amx":
            return WeightFormat(Layout.BFLOAT16_TILES, num_terms=2)
        return WeightFormat(Layout.BFLOAT16_PANELS)
    return WeightFormat(Layout.INT16_GROUPS)


class _NativeAttentionStep:
    """An `AttentionStep`."""

    def __init__(
        self,
        attention: NativeAttention,
        plan: StepPlan,
        pages: KVPages,
        rotary: RotaryEmbedding,
    ) -> None:
        self._rotation = rotary(plan.positions, torch.float32)
        self._attention = attention(plan, pages)
        self._slot_mapping = plan.slot_mapping
        self._pages = pages
        self._rotate: RotateAndStore | None = None

    def __call__(self, qkv: Tensor, layer: int, heads: AttentionHeads) -> Tensor:
        num_queries, head_dim = heads.heads.num_query_heads, heads.head_dim
        if self._rotate is None:
            self._rotate = RotateAndStore(
                self._rotation.cos,
                self._rotation.sin,
                self._slot_mapping,
                self._pages.shape,
                num_queries,
            )
        pages = self._pages.layer(layer)
        self._rotate(qkv, pages, heads.query_norm, heads.key_norm, heads.eps)
        query = qkv[:, : num_queries * head_dim].view(-1, num_queries, head_dim)
        return self._attention(query, pages, heads.heads, head_dim**-0.5).flatten(1)


def _add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if delta is None:
        return rms_norm(hidden, weight, eps)
    return add_rms_norm(hidden, delta, weight, eps, out=delta)
