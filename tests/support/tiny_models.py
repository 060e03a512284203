"""Tiny models with random weights, one per architecture, in every form that we read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize

from gpu_worker.models.gguf_weights import gguf_name

VOCAB_SIZE = 211
"""Prime, so that no tensor-parallel size divides it."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.2,
}

SPECS: dict[str, dict[str, Any]] = {
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": None},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "head_dim": None,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}


def make_tiny_model(spec: str, directory: Path, **changes: Any) -> Any:
    """Build a `transformers` model of random weights, and save it in shards of some 100 kB.

    `changes` are fields of its configuration that differ from the architecture's usual ones here.
    Biases and norms are random too: their defaults, 0 and 1, would hide that one is left out.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        # Deprecations inside transformers and what it imports are not ours to fix.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {**_COMMON, **SPECS[spec], **changes}
        fields = {name: value for name, value in fields.items() if value is not None}
        torch.manual_seed(sum(map(ord, spec)))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(directory, max_shard_size="100kB")
    return model


def write_gguf(model: Any, path: Path, quantization: Callable[[str], GGMLQuantizationType]) -> None:
    """Write `model` (from `make_tiny_model`) the way llama.cpp's converter lays files out.

    `quantization` picks each matrix's type by its Hugging Face name; vectors stay F32.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(config.eos_token_id)
    if config.rope_parameters["rope_type"] == "llama3":
        # The converter turns llama3's scaling into one divisor per frequency.
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (
            torch.arange(0, head_dim, 2).float() / head_dim
        )
        factors = plain / model.model.rotary_emb.inv_freq.float()
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    elif config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    elif config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            config.rope_parameters["original_max_position_embeddings"]
        )
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _llama_cpp_permuted(values, head_dim)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            kind = quantization(name)
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_permuted(weights: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Interleave the two rotated halves of each head's rows: 0, d/2, 1, d/2 + 1, ..."""
    order = np.arange(head_dim).reshape(2, head_dim // 2).T.flatten()
    heads = weights.reshape(-1, head_dim, weights.shape[1])
    return np.ascontiguousarray(heads[:, order].reshape(weights.shape))
