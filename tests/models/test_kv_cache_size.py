"""How many blocks the KV-cache gets, and what that leaves of the model's context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker import memory
from gpu_worker.memory import CPU_TOKENS, available_memory_bytes, default_kv_cache_bytes
from gpu_worker.model_runner import ModelRunner
from gpu_worker.tensor_parallel import TensorParallelGroup
from support.tiny_models import make_tiny_model
from wire.errors import ModelError

BYTES_PER_BLOCK = 2 * 2 * 2 * 16 * 16 * 4
"""Layers, keys and values, heads, tokens, head_dim, float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2")
    make_tiny_model("qwen2", directory)
    return directory


def load(model: Path, **options: int) -> ModelRunner:
    return ModelRunner(model, group=TensorParallelGroup.single(), **options)  # type: ignore[arg-type]


def test_bytes_become_whole_blocks(model: Path) -> None:
    assert load(model, kv_cache_bytes=50 * BYTES_PER_BLOCK + 1).num_blocks == 50


def test_a_small_cache_shortens_the_context(model: Path) -> None:
    assert load(model, num_blocks=20).config.max_model_len == 256
    assert load(model, num_blocks=3).config.max_model_len == 48


def test_too_little_for_one_block_says_how_much_a_block_takes(model: Path) -> None:
    with pytest.raises(ModelError, match=f"one block .* takes {BYTES_PER_BLOCK}"):
        load(model, kv_cache_bytes=BYTES_PER_BLOCK - 1)


def test_by_default_the_ranks_share_a_bounded_part_of_what_is_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def default(num_ranks: int, max_model_len: int) -> int:
        cpu = torch.device("cpu")
        return default_kv_cache_bytes(
            cpu, num_ranks, bytes_per_token=1000, max_model_len=max_model_len
        )

    assert 0 < available_memory_bytes() < 2**50
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 400_000_000)
    assert default(1, 100) == CPU_TOKENS * 1000
    assert default(1, 50_000) == 50_000_000
    assert default(1, 200_000) == 100_000_000
    assert default(5, 200_000) == 20_000_000


def test_files_that_a_container_has_cached_do_not_count_as_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("8000000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    assert available_memory_bytes() == 1_000_000
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 6000000\nactive_file 9\n")
    assert available_memory_bytes() == 7_000_000
