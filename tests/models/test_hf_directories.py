"""Hugging Face directories: what config.json may say, and damage that ends in one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.hf_config import read_hf_config
from gpu_worker.models.safetensors_weights import SafetensorsWeights
from gpu_worker.models.weights import open_model
from gpu_worker.tensor_parallel import TensorParallelGroup
from support.tiny_models import make_tiny_model
from wire.errors import ModelError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write CONFIG with some fields changed (None removes one); returns the directory."""

    def write_config(**changes: object) -> Path:
        fields = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write_config


def test_defaults_follow_the_format(write: Callable[..., Path]) -> None:
    config = read_hf_config(write(num_key_value_heads=None))
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


def test_generation_config_names_the_eos_tokens(write: Callable[..., Path]) -> None:
    directory = write()
    assert read_hf_config(directory).eos_token_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_hf_config(directory).eos_token_ids == (7, 9)


def test_both_spellings_of_rope_scaling_are_read(write: Callable[..., Path]) -> None:
    old = read_hf_config(write(rope_theta=5e5, rope_scaling=LLAMA3))
    new = read_hf_config(write(rope_parameters={**LLAMA3, "rope_theta": 5e5}))
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling is not None
    assert new.rope_scaling.original_max_len == 1024


def test_mistral_is_llama_and_its_window_bounds_the_context(write: Callable[..., Path]) -> None:
    directory = write(model_type="mistral", sliding_window=1024)
    with pytest.raises(ModelError, match=r"sliding_window .* 1024 .* to 1024 or less"):
        read_hf_config(directory)
    config = read_hf_config(directory, max_model_len=1024)
    assert (config.architecture, config.max_model_len) == ("llama", 1024)


def test_a_window_that_qwen_does_not_use_is_no_obstacle(write: Callable[..., Path]) -> None:
    fields = {"model_type": "qwen2", "sliding_window": 1024}
    assert read_hf_config(write(**fields, use_sliding_window=False)).max_model_len == 4096
    with pytest.raises(ModelError, match="sliding_window"):
        read_hf_config(write(**fields, use_sliding_window=True))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gemma"}, "'gemma' is not supported"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_experts": 8}, "mixture-of-experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": 100}, "token 100 is outside the vocabulary"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1.0"),
        # Numbers that are well formed, but made to overflow a float or to fill the memory.
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10*[.]+; it must be a finite number"),
        ({"max_position_embeddings": 2**64}, "whole number of at most 64 bits"),
        ({"num_hidden_layers": 2**31 - 1}, "num_layers is 2147483647; it must be 1 to 4096"),
        ({"num_attention_heads": 2**30, "head_dim": 2}, "num_heads is 1073741824"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e308}}, "max_model_len is 9223"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "it must be above low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "llama3 .* is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1}, "yarn needs"),
    ],
)
def test_an_unsupported_or_damaged_configuration_is_named(
    write: Callable[..., Path], changes: dict[str, object], complaint: str
) -> None:
    directory = write(**changes)
    with pytest.raises(ModelError, match=complaint) as caught:
        read_hf_config(directory)
    assert str(directory / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"9" * 5_000])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("requested", [0, 4097])
def test_a_context_that_the_model_does_not_have_is_refused(
    write: Callable[..., Path], requested: int
) -> None:
    with pytest.raises(ModelError, match=f"max_model_len is {requested}; .* 1 to 4096"):
        read_hf_config(write(), max_model_len=requested)


def test_a_path_that_holds_no_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        open_model(tmp_path / "nothing")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a model directory nor a \.gguf file"):
        open_model(tmp_path / "model.bin")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_tiny_model("qwen2", tmp_path)
    return tmp_path


def load(directory: Path) -> ModelRunner:
    return ModelRunner(directory, group=TensorParallelGroup.single(), num_blocks=1)


def test_a_slice_reads_only_that_slice(sharded: Path) -> None:
    reader = SafetensorsWeights(sharded)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = reader.read(name, (96, 128))
    assert torch.equal(
        reader.read(name, (96, 128), rows=range(3, 9), columns=range(50, 60)), whole[3:9, 50:60]
    )
    bias = reader.read("model.layers.0.self_attn.q_proj.bias", (96,))
    part = reader.read("model.layers.0.self_attn.q_proj.bias", (96,), rows=range(16, 48))
    assert torch.equal(part, bias[16:48])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        load(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{shard.name} is damaged or truncated"):
        load(sharded)


@pytest.mark.parametrize("file_name", ["../secret.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_lead_out_of_the_directory(sharded: Path, file_name: object) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file_name}}))
    with pytest.raises(ModelError, match="which is no file name"):
        load(sharded)


def test_a_tensor_that_contradicts_the_configuration_is_named(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"gate_proj.weight has shape \[128, 96\]"):
        load(sharded)


@pytest.mark.parametrize("size", ["intermediate_size", "vocab_size"])
def test_a_size_that_no_memory_holds_is_refused_before_memory_is_taken(
    sharded: Path, size: str
) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, size: 2**31 - 1}))
    with pytest.raises(ModelError, match=r"has shape .*; the files do not belong together"):
        load(sharded)


def test_a_directory_without_weights_or_with_unreadable_ones_is_refused(
    write: Callable[..., Path],
) -> None:
    directory = write()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(directory)
    save_file(
        {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, directory / "model.safetensors"
    )
    reader = SafetensorsWeights(directory)
    with pytest.raises(ModelError, match="stored as I8"):
        reader.read("model.norm.weight", (64,))
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        reader.read("lm_head.weight", (100, 64))
