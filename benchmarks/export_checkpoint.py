"""Write a model as the Hugging Face directory that peers can load, from whatever Forebay loads.

    python -m benchmarks.export_checkpoint --model model.gguf --out DIR [--dtype bfloat16] [--w8a8]

With `--w8a8` the linear layers (not the head) are int8 in the compressed-tensors layout that vLLM
reads: symmetric, rounded to nearest, one scale per output channel; activations are quantized per
token as they come. That is the plainest scheme there is, and loses quality: a bar for speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.models.card import load_model_card
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.weights import open_model
from wire.messages import ModelCard

_INT8_MAX = 127
_SMALLEST_SCALE = 1e-10

_W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def export(model: Path, out: Path, dtype: torch.dtype, *, w8a8: bool) -> None:
    """Write the directory. Raises ModelError, and ValueError for a model that is not covered."""
    config, reader = open_model(model)
    if config.rope_scaling is not None:
        raise ValueError("models with scaled rotary frequencies are not exported")
    card = load_model_card(model, name=None, block_size=16, max_model_len=None)
    tensors: dict[str, Tensor] = {}
    for name, shape in _shapes(config):
        weight = reader.read(name, shape).float()
        if w8a8 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale"] = _int8(weight)
        else:
            tensors[name] = weight.to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_bytes(card.tokenizer_json)
    _write(out / "tokenizer_config.json", _tokenizer_config(config, card))
    tokens = {"bos_token_id": card.bos_token_id, "eos_token_id": [*config.eos_token_ids]}
    _write(out / "generation_config.json", tokens)
    model_config = _model_config(config, card) | {"dtype": str(dtype).removeprefix("torch.")}
    _write(out / "config.json", model_config | ({"quantization_config": _W8A8} if w8a8 else {}))


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) int8 and (rows, 1) float32, whose product is near `weight`."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST_SCALE) / _INT8_MAX
    return (weight / scale).round().to(torch.int8), scale


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        per_layer["self_attn.q_proj.bias"] = (query,)
        per_layer |= {f"self_attn.{part}_proj.bias": (kv,) for part in "kv"}
    if config.qk_norm:
        per_layer |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    for layer in range(config.num_layers):
        for name, shape in per_layer.items():
            yield f"model.layers.{layer}.{name}", shape


def _model_config(config: ModelConfig, card: ModelCard) -> dict[str, Any]:
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.architecture]
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_model_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": card.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.eos_token_ids[0],
    }


def _tokenizer_config(config: ModelConfig, card: ModelCard) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": card.bos_token,
        "eos_token": card.eos_token,
        "pad_token": card.eos_token,
        "chat_template": card.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_model_len,
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--w8a8", action="store_true", help="int8 weights, for vLLM")
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    export(arguments.model, arguments.out, dtype, w8a8=arguments.w8a8)
    size = (arguments.out / "model.safetensors").stat().st_size
    print(f"{arguments.out}: {size / 1e6:.0f} MB of weights")


if __name__ == "__main__":
    main()
