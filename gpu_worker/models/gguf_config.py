"""ModelConfig from a GGUF file's metadata."""

from __future__ import annotations

from typing import cast, get_args

from gpu_worker.models.config import (
    Architecture,
    ModelConfig,
    RopeScaling,
    check_config,
    limit_context,
)
from gpu_worker.models.fields import Fields
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_tensors import read_float_vector
from wire.errors import ModelError

_DEFAULT_ROPE_THETA = 10_000.0
_EMBEDDING = "token_embd.weight"
_OUTPUT_HEAD = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_QKV_BIASES = (".attn_q.bias", ".attn_k.bias", ".attn_v.bias")


def read_gguf_config(file: GGUFFile, max_model_len: int | None = None) -> ModelConfig:
    """The configuration in `file`, with its context cut to `max_model_len` if given.

    Raises ModelError, naming the file and the field, for what is missing, wrong or unsupported.
    """
    origin = str(file.path)
    general = Fields(file.metadata, origin)
    if general.integer("split.count", 0) > 1:
        raise ModelError(
            f"{origin} is one part of a split model; merge the parts with llama-gguf-split --merge"
        )
    architecture = general.text("general.architecture")
    if architecture not in get_args(Architecture):
        supported = ", ".join(get_args(Architecture))
        raise ModelError(
            f"{origin}: architecture {architecture!r} is not supported; use one of {supported}"
        )
    fields = Fields(file.metadata, origin, prefix=f"{architecture}.")
    num_heads = fields.integer("attention.head_count")
    hidden_size = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // max(num_heads, 1))
    context = limit_context(fields.integer("context_length"), max_model_len, origin)
    _refuse_unsupported(fields, head_dim, context)
    _refuse_biases(file, architecture)
    config = ModelConfig(
        architecture=cast(Architecture, architecture),
        vocab_size=_vocab_size(file),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_model_len=context,
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.positive("rope.freq_base", _DEFAULT_ROPE_THETA),
        rope_scaling=_rope_scaling(file, fields),
        tie_word_embeddings=_OUTPUT_HEAD not in file.tensors,
        eos_token_ids=_eos_token_ids(general),
    )
    return check_config(config, origin)


def _vocab_size(file: GGUFFile) -> int:
    if _EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path}: tensor {_EMBEDDING} is missing; the file is damaged")
    return file.tensors[_EMBEDDING].shape[0]


def _rope_scaling(file: GGUFFile, fields: Fields) -> RopeScaling | None:
    if _ROPE_FACTORS in file.tensors:
        return RopeScaling("factors", frequency_factors=read_float_vector(file, _ROPE_FACTORS))
    kind = fields.text("rope.scaling.type", "none")
    match kind:
        case "none":
            return None
        case "linear":
            return RopeScaling("linear", factor=fields.positive("rope.scaling.factor"))
        case "yarn":
            return RopeScaling(
                "yarn",
                factor=fields.positive("rope.scaling.factor"),
                original_max_len=fields.integer("rope.scaling.original_context_length"),
            )
        case _:
            raise ModelError(
                f"{fields.origin}: rope.scaling.type {kind!r} is not supported; "
                "none, linear and yarn are"
            )


def _refuse_unsupported(fields: Fields, head_dim: int, context: int) -> None:
    origin = fields.origin
    if fields.integer("expert_count", 0):
        raise ModelError(f"{origin}: expert_count is set; mixture-of-experts is not supported")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{origin}: rotating only a part of each head is not supported")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{origin}: values of another length than keys are not supported")
    window = fields.integer("attention.sliding_window", 0)
    if window and window < context:
        raise ModelError(
            f"{origin}: sliding_window attention over {window} tokens is not supported; "
            f"set the maximum model length to {window} or less"
        )


def _refuse_biases(file: GGUFFile, architecture: str) -> None:
    """No field of a GGUF file tells of biases; those that are left out make a wrong model."""
    added = _QKV_BIASES if architecture == "qwen2" else ()
    for name in file.tensors:
        if name.endswith(".bias") and not name.endswith(added):
            raise ModelError(f"{file.path}: bias {name} is not supported for {architecture}")


def _eos_token_ids(general: Fields) -> tuple[int, ...]:
    """End of sequence, of turn and of message: each ends an answer."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [i for name in names for i in general.integers(f"tokenizer.ggml.{name}")]
    return tuple(dict.fromkeys(ids))
