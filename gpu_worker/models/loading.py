"""Building a decoder: each rank reads its own slices of the checkpoint, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.attention.interface import HeadMap
from gpu_worker.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from gpu_worker.layers.linear import ColumnParallelLinear, RowParallelLinear
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.layers.self_attention import SelfAttention
from gpu_worker.layers.sharding import even_split, shard_model
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder, DecoderLayer
from gpu_worker.models.weights import WeightReader
from gpu_worker.tensor_parallel import TensorParallelGroup

_NUM_READERS = 2
"""Layers read at a time. Reading is decompression and copying; more threads starve other ranks."""


def load_decoder(
    config: ModelConfig,
    reader: WeightReader,
    group: TensorParallelGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """Read this rank's part of the model. Raises ModelError for bad files or too many ranks."""
    loader = _Loader(config, reader, group, dtype, device)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="load-weights") as pool:
        layers = tuple(pool.map(loader.layer, range(config.num_layers)))
    return loader.decoder(layers)


@dataclass
class _Loader:
    config: ModelConfig
    reader: WeightReader
    group: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.shard = shard_model(self.config, self.group.size, self.group.rank)
        self.heads = HeadMap.build(self.shard.kv_head_of_query, self.device)
        head_dim = self.config.head_dim
        self.query_rows = _scaled(self.shard.query_heads, head_dim)
        self.kv_rows = _scaled(self.shard.kv_heads, head_dim)

    def decoder(self, layers: tuple[DecoderLayer, ...]) -> Decoder:
        config, shard = self.config, self.shard
        embedding = self._stacked(["model.embed_tokens"], [config.vocab_size], [shard.vocab_rows])
        head = embedding
        if not config.tie_word_embeddings:
            head = self._stacked(["lm_head"], [config.vocab_size], [shard.vocab_rows])
        shard_lens = tuple(
            len(even_split(config.vocab_size, shard.size, rank)) for rank in range(shard.size)
        )
        sharded = [embedding] if head is embedding else [embedding, head]
        for layer in layers:
            qkv = layer.attention.qkv
            sharded += [qkv.weight, *([] if qkv.bias is None else [qkv.bias])]
            sharded += [layer.attention.output.weight]
            sharded += [layer.mlp.gate_up.weight, layer.mlp.down.weight]
        return Decoder(
            embedding=VocabParallelEmbedding(embedding, shard.vocab_rows.start, self.group),
            rotary=RotaryEmbedding(config, self.device),
            layers=layers,
            norm=self._norm("model.norm", config.hidden_size),
            head=VocabParallelHead(head, shard_lens, self.group),
            num_sharded_bytes=sum(weight.nbytes for weight in sharded),
        )

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        hidden_size = self.config.hidden_size
        return DecoderLayer(
            attention_norm=self._norm(f"{prefix}.input_layernorm", hidden_size),
            attention=self._attention(f"{prefix}.self_attn"),
            mlp_norm=self._norm(f"{prefix}.post_attention_layernorm", hidden_size),
            mlp=self._mlp(f"{prefix}.mlp"),
        )

    def _attention(self, prefix: str) -> SelfAttention:
        config = self.config
        num_query_rows = config.num_heads * config.head_dim
        num_kv_rows = config.num_kv_heads * config.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        sizes = [num_query_rows, num_kv_rows, num_kv_rows]
        rows = [self.query_rows, self.kv_rows, self.kv_rows]
        bias = self._stacked_bias(names, sizes, rows) if config.qkv_bias else None
        qk_norm = config.qk_norm
        return SelfAttention(
            qkv=ColumnParallelLinear(self._stacked(names, sizes, rows), bias),
            output=self._row_parallel(f"{prefix}.o_proj", num_query_rows, self.query_rows),
            query_norm=self._norm(f"{prefix}.q_norm", config.head_dim) if qk_norm else None,
            key_norm=self._norm(f"{prefix}.k_norm", config.head_dim) if qk_norm else None,
            heads=self.heads,
            head_dim=config.head_dim,
        )

    def _mlp(self, prefix: str) -> GatedMLP:
        size, columns = self.config.intermediate_size, self.shard.mlp_columns
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        return GatedMLP(
            gate_up=ColumnParallelLinear(self._stacked(names, [size] * 2, [columns] * 2)),
            down=self._row_parallel(f"{prefix}.down_proj", size, columns),
        )

    def _stacked(self, names: Sequence[str], sizes: Sequence[int], rows: Sequence[range]) -> Tensor:
        """Slices of several matrices, one under the other: rows[i] of names[i], of sizes[i]."""
        columns = self.config.hidden_size
        reads = (
            self.reader.read(f"{name}.weight", (size, columns), rows=part_rows)
            for name, size, part_rows in zip(names, sizes, rows, strict=True)
        )
        # Memory is taken once a tensor has confirmed the sizes: they come from a stranger's file.
        first = next(reads)
        fused = self._empty(sum(map(len, rows)), columns)
        parts = torch.split(fused, [len(part) for part in rows])
        for part, values in zip(parts, itertools.chain([first], reads), strict=True):
            part.copy_(values)
        return fused

    def _stacked_bias(
        self, names: Sequence[str], sizes: Sequence[int], rows: Sequence[range]
    ) -> Tensor:
        parts = [
            self.reader.read(f"{name}.bias", (size,), rows=part_rows)
            for name, size, part_rows in zip(names, sizes, rows, strict=True)
        ]
        return torch.cat(parts).to(self.device, self.dtype)

    def _row_parallel(self, name: str, num_inputs: int, columns: range) -> RowParallelLinear:
        num_outputs = self.config.hidden_size
        values = self.reader.read(f"{name}.weight", (num_outputs, num_inputs), columns=columns)
        # A copy of its own, in rows: a column slice may be a view of the whole matrix.
        weight = self._empty(num_outputs, len(columns)).copy_(values)
        return RowParallelLinear(weight, self.group)

    def _norm(self, name: str, num_features: int) -> RMSNorm:
        weight = self.reader.read(f"{name}.weight", (num_features,))
        return RMSNorm(weight.to(self.device, self.dtype), self.config.rms_norm_eps)

    def _empty(self, num_rows: int, num_columns: int) -> Tensor:
        return torch.empty(num_rows, num_columns, dtype=self.dtype, device=self.device)


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
