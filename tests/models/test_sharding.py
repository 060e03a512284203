"""Every tensor-parallel size up to the number of query heads shards the model, evenly or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 9])
def test_inputs_are_cut_where_a_group_of_quantized_weights_ends(
    config: ModelConfig, size: int
) -> None:
    for part in shards(config, size):
        assert part.mlp_columns.start % 64 == 0
        assert part.query_heads.start * config.head_dim % 64 == 0
    widths = [len(part.mlp_columns) for part in shards(config, size)]
    assert max(widths) - min(widths) in (0, 64)


@pytest.mark.parametrize(
    ("num_columns", "size", "widths"),
    [
        (1000, 3, [334, 333, 333]),  # no multiple of anything: as even as it goes
        (1008, 3, [336, 336, 336]),  # whole vectors
        (128, 3, [48, 48, 32]),  # two groups cannot serve three ranks
        (1600, 2, [832, 768]),
    ],
)
def test_columns_that_make_no_groups_are_cut_as_evenly_as_they_go(
    config: ModelConfig, num_columns: int, size: int, widths: list[int]
) -> None:
    parts = shards(replace(config, intermediate_size=num_columns), size)
    assert [len(part.mlp_columns) for part in parts] == widths
    assert [c for part in parts for c in part.mlp_columns] == list(range(num_columns))


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "size", "heads"),
    [
        (12, 32, 3, [4, 4, 4]),  # pairs make groups
        (12, 32, 4, [3, 3, 3, 3]),  # pairs would leave 4 to one rank
        (8, 80, 2, [4, 4]),  # fours make groups
        (8, 80, 3, [3, 3, 2]),  # fours do not go around
        (9, 32, 2, [5, 4]),
    ],
)
def test_small_heads_are_dealt_out_in_whole_groups_if_that_costs_no_balance(
    config: ModelConfig, num_heads: int, head_dim: int, size: int, heads: list[int]
) -> None:
    model = replace(config, num_heads=num_heads, num_kv_heads=1, head_dim=head_dim)
    assert [len(part.query_heads) for part in shards(model, size)] == heads


@pytest.mark.parametrize("size", [0, 10])
def test_a_size_that_leaves_ranks_without_heads_is_refused(config: ModelConfig, size: int) -> None:
    with pytest.raises(ModelError, match=rf"size {size} .* 9 query heads; use 1 to 9"):
        shard_model(config, size, 0)


def test_a_size_that_leaves_ranks_without_a_column_or_a_token_is_refused(
    config: ModelConfig,
) -> None:
    with pytest.raises(ModelError, match=r"size 3 .* 2 feed-forward columns; use 1 to 2"):
        shard_model(replace(config, intermediate_size=2), 3, 0)
    with pytest.raises(ModelError, match=r"size 3 .* 2 tokens in its vocabulary; use 1 to 2"):
        shard_model(replace(config, vocab_size=2), 3, 0)


def test_of_two_ranks_none_holds_more_than_60_percent_of_the_sharded_weights(
    gguf_path: Path,
) -> None:
    def load(group: TensorParallelGroup) -> int:
        runner = ModelRunner(gguf_path, group=group, num_blocks=1, dtype="bfloat16")
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
