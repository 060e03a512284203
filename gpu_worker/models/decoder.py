"""The decoder: one plain forward pass for Llama, Mistral, Qwen2 and Qwen3, on flattened tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cache.pages import KVPages, LayerPages
from gpu_worker.attention.interface import PagedAttention
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.rotary import RotaryEmbedding, Rotation
from gpu_worker.layers.self_attention import SelfAttention


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then feed-forward, each normalized before and added to the residual stream."""

    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self,
        hidden: Tensor,
        rotation: Rotation,
        slot_rows: Tensor,
        pages: LayerPages,
        paged_attention: PagedAttention,
    ) -> Tensor:
        """(num_tokens, hidden) -> (num_tokens, hidden)."""
        hidden = hidden + self.attention(
            self.attention_norm(hidden), rotation, slot_rows, pages, paged_attention
        )
        return hidden + self.mlp(self.mlp_norm(hidden))


@dataclass(frozen=True, slots=True)
class Decoder:
    """The whole model, or one rank's part of it. `num_sharded_bytes` counts what ranks share out:
    every weight but the norms'.
    """

    embedding: VocabParallelEmbedding
    rotary: RotaryEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: VocabParallelHead
    num_sharded_bytes: int

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        logits_rows: Tensor,
        pages: KVPages,
        paged_attention: PagedAttention,
        done: LayerCounter,
    ) -> Tensor | None:
        """One step; `done` counts its layers. All index tensors are int64 on the model's device.

        Returns (len(logits_rows), vocab_size) float32 logits on rank 0, None on other ranks.
        """
        hidden = self.embedding(token_ids)
        rotation = self.rotary(positions, hidden.dtype)
        slot_rows = pages.slot_rows(slot_mapping)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotation, slot_rows, pages.layer(index), paged_attention)
            done.add()
        return self.head(self.norm(hidden[logits_rows]))
