"""The decoder: one plain forward pass for Llama, Mistral, Qwen2 and Qwen3, on flattened tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cache.pages import KVPages
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.operations import AttentionStep, Operations
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.layers.self_attention import SelfAttention
from gpu_worker.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then feed-forward, each normalized before and added to the residual stream."""

    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, hidden: Tensor, delta: Tensor | None, attention: AttentionStep) -> Tensor:
        """What is to be added to `hidden`, which takes in `delta` on the way, in place.

        All are (num_tokens, hidden). Adding is left to the next normalization, which reads the
        whole stream anyway.
        """
        delta = self.attention(self.attention_norm(hidden, delta), attention)
        return self.mlp(self.mlp_norm(hidden, delta))


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
    operations: Operations
    num_sharded_bytes: int

    def __call__(
        self,
        plan: StepPlan,
        token_ids: Tensor,
        logits_rows: Tensor,
        pages: KVPages,
        done: LayerCounter,
    ) -> Tensor | None:
        """One step; `done` counts its layers.

        `token_ids` and `logits_rows` are the plan's, int64 on the model's device. Returns
        (len(logits_rows), vocab_size) float32 logits on rank 0, None on other ranks.
        """
        attention = self.operations.attention(plan, pages, self.rotary)
        hidden, delta = self.embedding(token_ids), None
        for layer in self.layers:
            delta = layer(hidden, delta, attention)
            done.add()
        assert delta is not None, "a model has layers"
        return self.head(self.norm(hidden[logits_rows], delta[logits_rows]))
