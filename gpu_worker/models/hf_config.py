"""ModelConfig from a Hugging Face directory: config.json and generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from gpu_worker.models.config import (
    Architecture,
    ModelConfig,
    RopeScaling,
    check_config,
    limit_context,
)
from gpu_worker.models.fields import Fields
from gpu_worker.models.files import read_json_object
from wire.errors import ModelError

_DEFAULT_ROPE_THETA = 10_000.0
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` -> architecture. Mistral computes what Llama computes."""


def read_hf_config(directory: Path, max_model_len: int | None = None) -> ModelConfig:
    """The configuration in `directory`, with its context cut to `max_model_len` if given.

    Raises ModelError, naming the file and the field, for what is missing, wrong or unsupported.
    """
    path = directory / "config.json"
    fields = Fields(read_json_object(path), str(path))
    architecture = _architecture(fields)
    rope_theta, scaling = _rope(fields)
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    context = limit_context(_context_len(fields, scaling), max_model_len, str(path))
    _refuse_unsupported(fields, architecture, context)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // max(num_heads, 1)),
        max_model_len=context,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=_eos_token_ids(directory, fields),
    )
    return check_config(config, str(path))


def _architecture(fields: Fields) -> Architecture:
    model_type = fields.text("model_type")
    if model_type not in _ARCHITECTURES:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(
            f"{fields.origin}: model_type {model_type!r} is not supported; use one of {supported}"
        )
    architecture = _ARCHITECTURES[model_type]
    assert architecture in get_args(Architecture)
    return cast(Architecture, architecture)


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from transformers 5's `rope_parameters` or the older two fields."""
    if fields.has("rope_parameters"):
        rope = fields.mapping("rope_parameters")
        theta = rope.positive("rope_theta", fields.positive("rope_theta", _DEFAULT_ROPE_THETA))
    else:
        rope = fields.mapping("rope_scaling")
        theta = fields.positive("rope_theta", _DEFAULT_ROPE_THETA)
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{fields.origin}: a partial_rotary_factor below 1 is not supported")
    return theta, _rope_scaling(rope, fields)


def _rope_scaling(rope: Fields, fields: Fields) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    original = rope.integer(
        "original_max_position_embeddings", fields.integer("max_position_embeddings")
    )
    match kind:
        case "default":
            return None
        case "linear":
            return RopeScaling("linear", factor=rope.positive("factor"))
        case "llama3":
            return RopeScaling(
                "llama3",
                factor=rope.positive("factor"),
                original_max_len=original,
                low_freq_factor=rope.positive("low_freq_factor"),
                high_freq_factor=rope.positive("high_freq_factor"),
            )
        case "yarn":
            if rope.has("mscale") or rope.has("mscale_all_dim"):
                raise ModelError(f"{rope.origin}: yarn with mscale is not supported")
            return RopeScaling(
                "yarn",
                factor=rope.positive("factor"),
                original_max_len=original,
                beta_fast=rope.positive("beta_fast", 32.0),
                beta_slow=rope.positive("beta_slow", 1.0),
                attention_factor=(
                    rope.positive("attention_factor") if rope.has("attention_factor") else None
                ),
                truncate=rope.flag("truncate", True),
            )
        case _:
            raise ModelError(
                f"{rope.origin}: rope_type {kind!r} is not supported; "
                "default, linear, llama3 and yarn are"
            )


def _context_len(fields: Fields, scaling: RopeScaling | None) -> int:
    """Tokens that the model was made for.

    `max_position_embeddings` already counts llama3's stretch, but not linear's; yarn's stretches
    the original length (the convention of published Vicuna and Qwen checkpoints).
    """
    declared = fields.integer("max_position_embeddings")
    if scaling is None or scaling.kind == "llama3":
        return declared
    if scaling.kind == "yarn":
        return max(declared, _stretched(scaling.original_max_len, scaling.factor))
    return _stretched(declared, scaling.factor)


def _stretched(length: int, factor: float) -> int:
    """The product, cut to a range that is checked later: a float may hold an infinity."""
    return int(max(0.0, min(length * factor, 2.0**63)))


def _refuse_unsupported(fields: Fields, architecture: Architecture, context: int) -> None:
    origin = fields.origin
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{origin}: hidden_act {activation!r} is not supported; silu is")
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.has(name):
            raise ModelError(f"{origin}: {name} is set; mixture-of-experts is not supported")
    if architecture != "qwen2" and fields.flag("attention_bias", False):
        raise ModelError(f"{origin}: attention_bias is not supported for {architecture}")
    if fields.flag("mlp_bias", False):
        raise ModelError(f"{origin}: mlp_bias is not supported")
    if fields.has("quantization_config"):
        method = fields.mapping("quantization_config").text("quant_method", "unknown")
        raise ModelError(
            f"{origin}: weights quantized with {method!r} are not supported; "
            "use the original weights or a GGUF file"
        )
    window = _sliding_window(fields, architecture)
    if window is not None and window < context:
        raise ModelError(
            f"{origin}: sliding_window attention over {window} tokens is not supported; "
            f"set the maximum model length to {window} or less"
        )


def _sliding_window(fields: Fields, architecture: Architecture) -> int | None:
    """The window in tokens if some layer uses one: Qwen must switch it on, Mistral has it on."""
    if not fields.has("sliding_window"):
        return None
    default_use = architecture == "llama"
    if not fields.flag("use_sliding_window", default_use):
        return None
    return fields.integer("sliding_window")


def _eos_token_ids(directory: Path, fields: Fields) -> tuple[int, ...]:
    """generation_config.json goes first: config.json often names only one of a chat model's."""
    path = directory / "generation_config.json"
    if path.is_file():
        ids = Fields(read_json_object(path), str(path)).integers("eos_token_id")
        if ids:
            return ids
    return fields.integers("eos_token_id")
