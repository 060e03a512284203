"""Every tensor-parallel size up to the number of query heads shards the model, evenly or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker.layers.sharding import ModelShard, shard_model
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.gguf_config import read_gguf_config
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.tensor_parallel import TensorParallelGroup
from support.thread_group import run_as_ranks
from wire.errors import ModelError


@pytest.fixture(scope="module")
def config(gguf_path: Path) -> ModelConfig:
    """9 query heads, 3 key/value heads."""
    return read_gguf_config(GGUFFile(gguf_path))


def shards(config: ModelConfig, size: int) -> list[ModelShard]:
    return [shard_model(config, size, rank) for rank in range(size)]


def test_two_ranks_get_5_and_4_query_heads_and_share_the_key_value_head_between_them(
    config: ModelConfig,
) -> None:
    first, second = shards(config, 2)
    assert (first.query_heads, second.query_heads) == (range(5), range(5, 9))
    assert (first.kv_heads, second.kv_heads) == (range(2), range(1, 3))
    assert first.kv_head_of_query == (0, 0, 0, 1, 1)
    assert second.kv_head_of_query == (0, 1, 1, 1)


def test_more_ranks_than_key_value_heads_replicate_them(config: ModelConfig) -> None:
    assert [shard.kv_heads for shard in shards(config, 4)] == [
        range(1),
        range(1, 2),
        range(1, 3),
        range(2, 3),
    ]
    assert [shard.kv_heads for shard in shards(config, 9)] == [
        range(kv, kv + 1) for kv in (0, 0, 0, 1, 1, 1, 2, 2, 2)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 9])
def test_every_head_column_and_token_has_one_owner_and_each_query_its_key_value_head(
    config: ModelConfig, size: int
) -> None:
    parts = shards(config, size)
    assert [h for part in parts for h in part.query_heads] == list(range(9))
    assert [c for part in parts for c in part.mlp_columns] == list(range(1536))
    assert [v for part in parts for v in part.vocab_rows] == list(range(49152))
    for part in parts:
        for local, query_head in enumerate(part.query_heads):
            assert part.kv_heads[part.kv_head_of_query[local]] == query_head // 3


@pytest.mark.parametrize("size", [0, 10])
def test_a_size_that_leaves_ranks_without_heads_is_refused(config: ModelConfig, size: int) -> None:
    with pytest.raises(ModelError, match=rf"size {size} .* 9 query heads; use 1 to 9"):
        shard_model(config, size, 0)


def test_of_two_ranks_none_holds_more_than_60_percent_of_the_sharded_weights(
    gguf_path: Path,
) -> None:
    def load(group: TensorParallelGroup) -> int:
        runner = ModelRunner(gguf_path, group=group, num_blocks=1, dtype=torch.bfloat16)
        return runner.num_sharded_bytes

    [whole] = run_as_ranks(1, load)
    halves = run_as_ranks(2, load)
    assert max(halves) <= 0.6 * whole
    # Only the key/value head that lives on both is held twice: 2 projections of 64 rows a layer.
    assert sum(halves) - whole == 30 * 2 * 64 * 576 * 2


def test_all_ranks_count_the_same_blocks_from_the_same_memory(gguf_path: Path) -> None:
    def load(group: TensorParallelGroup) -> int:
        runner = ModelRunner(gguf_path, group=group, kv_cache_bytes=50_000_000)
        return runner.num_blocks

    [blocks] = set(run_as_ranks(4, load))
    # The widest of the 4 ranks has 2 key/value heads.
    assert blocks == 50_000_000 // (30 * 2 * 2 * 16 * 64 * 4)
