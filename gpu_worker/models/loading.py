"""Building a decoder: each rank reads its own slices of the checkpoint, and nothing else."""

from __future__ import annotations

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
from gpu_worker.layers.operations import AttentionHeads, Operations
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.layers.self_attention import SelfAttention
from gpu_worker.layers.sharding import even_split, shard_model
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder, DecoderLayer
from gpu_worker.models.weights import WeightReader
from gpu_worker.precision import Precision, Role
from gpu_worker.tensor_parallel import TensorParallelGroup

_NUM_READERS = 2
"""Layers read at a time. Reading is decompression and copying; more threads starve other ranks."""


def load_decoder(
    config: ModelConfig,
    reader: WeightReader,
    group: TensorParallelGroup,
    precision: Precision,
    operations: Operations,
    device: torch.device,
) -> Decoder:
    """Read this rank's part of the model. Raises ModelError for bad files or too many ranks."""
    loader = _Loader(config, reader, group, precision, operations, device)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="load-weights") as pool:
        # The vocabulary is the largest matrix by far in small models: it starts first.
        vocabulary = pool.submit(loader.vocabulary)
        layers = tuple(pool.map(loader.layer, range(config.num_layers)))
        embedding, head = vocabulary.result()
    norm = loader.norm("model.norm", config.hidden_size)
    sharded = [embedding.weight.nbytes, head.product.num_bytes]
    for layer in layers:
        sharded += [layer.attention.qkv.product.num_bytes, layer.attention.output.product.num_bytes]
        sharded += [layer.mlp.gate_up.product.num_bytes, layer.mlp.down.product.num_bytes]
    return Decoder(
        embedding=embedding,
        rotary=RotaryEmbedding(config, device),
        layers=layers,
        norm=norm,
        head=head,
        operations=operations,
        num_sharded_bytes=sum(sharded),
    )


@dataclass
class _Loader:
    config: ModelConfig
    reader: WeightReader
    group: TensorParallelGroup
    precision: Precision
    operations: Operations
    device: torch.device

    def __post_init__(self) -> None:
        self.shard = shard_model(self.config, self.group.size, self.group.rank)
        self.heads = HeadMap.build(self.shard.kv_head_of_query, self.device)
        head_dim = self.config.head_dim
        self.query_rows = _scaled(self.shard.query_heads, head_dim)
        self.kv_rows = _scaled(self.shard.kv_heads, head_dim)

    def vocabulary(self) -> tuple[VocabParallelEmbedding, VocabParallelHead]:
        config, shard = self.config, self.shard
        table = self._stacked(["model.embed_tokens"], [config.vocab_size], [shard.vocab_rows])
        head = table
        if not config.tie_word_embeddings:
            head = self._stacked(["lm_head"], [config.vocab_size], [shard.vocab_rows])
        shard_lens = tuple(
            len(even_split(config.vocab_size, shard.size, rank)) for rank in range(shard.size)
        )
        embedding = VocabParallelEmbedding(
            table.to(self.device, self.precision.dtype, copy=True),
            shard.vocab_rows.start,
            self.group,
            self.operations.activations,
        )
        product = self.operations.product(head, None, "head")
        return embedding, VocabParallelHead(product, shard_lens, self.group)

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        hidden_size = self.config.hidden_size
        return DecoderLayer(
            attention_norm=self.norm(f"{prefix}.input_layernorm", hidden_size),
            attention=self._attention(f"{prefix}.self_attn", index),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm", hidden_size),
            mlp=self._mlp(f"{prefix}.mlp"),
        )

    def norm(self, name: str, num_features: int) -> RMSNorm:
        weight = self._norm_weight(name, num_features)
        return RMSNorm(weight, self.config.rms_norm_eps, self.operations)

    def _attention(self, prefix: str, index: int) -> SelfAttention:
        config = self.config
        num_query_rows = config.num_heads * config.head_dim
        num_kv_rows = config.num_kv_heads * config.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        sizes = [num_query_rows, num_kv_rows, num_kv_rows]
        rows = [self.query_rows, self.kv_rows, self.kv_rows]
        bias = self._stacked_bias(names, sizes, rows) if config.qkv_bias else None
        query_norm = key_norm = None
        if config.qk_norm:
            query_norm = self._norm_weight(f"{prefix}.q_norm", config.head_dim)
            key_norm = self._norm_weight(f"{prefix}.k_norm", config.head_dim)
        return SelfAttention(
            index=index,
            qkv=self._column_parallel(names, sizes, rows, bias, "qkv"),
            output=self._row_parallel(
                f"{prefix}.o_proj", num_query_rows, self.query_rows, "attention_output"
            ),
            heads=AttentionHeads(
                self.heads, config.head_dim, query_norm, key_norm, config.rms_norm_eps
            ),
        )

    def _mlp(self, prefix: str) -> GatedMLP:
        size, columns = self.config.intermediate_size, self.shard.mlp_columns
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        return GatedMLP(
            gate_up=self._column_parallel(names, [size] * 2, [columns] * 2, None, "gate_up"),
            down=self._row_parallel(f"{prefix}.down_proj", size, columns, "down"),
        )

    def _column_parallel(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        rows: Sequence[range],
        bias: Tensor | None,
        role: Role,
    ) -> ColumnParallelLinear:
        weight = self._stacked(names, sizes, rows)
        return ColumnParallelLinear(self.operations.product(weight, bias, role))

    def _row_parallel(
        self, name: str, num_inputs: int, columns: range, role: Role
    ) -> RowParallelLinear:
        num_outputs = self.config.hidden_size
        weight = self.reader.read(f"{name}.weight", (num_outputs, num_inputs), columns=columns)
        return RowParallelLinear(self.operations.product(weight, None, role), self.group)

    def _stacked(self, names: Sequence[str], sizes: Sequence[int], rows: Sequence[range]) -> Tensor:
        """Slices of several matrices, one under the other: rows[i] of names[i], of sizes[i].

        In the precision that they are stored in.
        """
        columns = self.config.hidden_size
        parts = [
            self.reader.read(f"{name}.weight", (size, columns), rows=part_rows)
            for name, size, part_rows in zip(names, sizes, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stacked_bias(
        self, names: Sequence[str], sizes: Sequence[int], rows: Sequence[range]
    ) -> Tensor:
        return torch.cat(
            [
                self.reader.read(f"{name}.bias", (size,), rows=part_rows)
                for name, size, part_rows in zip(names, sizes, rows, strict=True)
            ]
        )

    def _norm_weight(self, name: str, num_features: int) -> Tensor:
        weight = self.reader.read(f"{name}.weight", (num_features,))
        # A copy, as what is read may be a view of the file: files can change under a running model.
        return weight.to(self.device, self.operations.activations, copy=True)


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
