"""What a model is: its architecture and sizes, free of where they were read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from wire.errors import ModelError

Architecture: TypeAlias = Literal["llama", "qwen2", "qwen3"]
RopeScalingKind: TypeAlias = Literal["linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the pre-training length.

    `factor` is the stretch. `original_max_len` is the pre-training context in tokens (llama3,
    yarn). `low_freq_factor` and `high_freq_factor` bound llama3's ramp, `beta_fast` and
    `beta_slow` yarn's; `attention_factor` scales yarn's cos and sin (None: derived from
    `factor`). Kind "factors" divides each frequency by the entry of `frequency_factors`, which
    is how GGUF files carry llama3's scaling.
    """

    kind: RopeScalingKind
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One dense decoder of the Llama family (Mistral included), Qwen2 or Qwen3.

    `max_model_len` is in tokens, prompt and output together. `eos_token_ids` are the tokens
    that end an answer.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head before the rotation."""
        return self.architecture == "qwen3"


_LARGEST_SIZES = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 2**31 - 1,
    "intermediate_size": 2**31 - 1,
    # What is built for each layer and head, before a tensor is seen, must not fill the memory.
    "num_layers": 4096,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 2**31 - 1,
    "max_model_len": 2**31 - 1,
}
"""Far above any model: what is larger comes from a damaged or a hostile file."""


def check_config(config: ModelConfig, origin: str) -> ModelConfig:
    """Return `config`, or raise ModelError for values out of range or that contradict each other.

    `origin` names the file that they came from.
    """
    for name, largest in _LARGEST_SIZES.items():
        value = getattr(config, name)
        if not 1 <= value <= largest:
            raise ModelError(f"{origin}: {name} is {value}; it must be 1 to {largest}")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{origin}: {config.num_heads} query heads cannot share {config.num_kv_heads} "
            "key/value heads evenly; the file is damaged"
        )
    if config.head_dim % 2:
        raise ModelError(f"{origin}: head_dim is {config.head_dim}; rotary needs an even one")
    for token_id in config.eos_token_ids:
        if not 0 <= token_id < config.vocab_size:
            raise ModelError(
                f"{origin}: end-of-sequence token {token_id} is outside the vocabulary "
                f"of {config.vocab_size}"
            )
    if config.rope_scaling is not None:
        _check_rope_scaling(config.rope_scaling, config.rope_theta, origin)
    return config


def _check_rope_scaling(scaling: RopeScaling, rope_theta: float, origin: str) -> None:
    """Raise ModelError for values from which no frequencies can be computed."""
    if scaling.kind in ("llama3", "yarn") and not 1 <= scaling.original_max_len < 2**31:
        raise ModelError(
            f"{origin}: the original context length of {scaling.kind} rope scaling is "
            f"{scaling.original_max_len}; it must be 1 to {2**31 - 1}"
        )
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelError(
            f"{origin}: high_freq_factor is {scaling.high_freq_factor}; it must be above "
            f"low_freq_factor, {scaling.low_freq_factor}"
        )
    if scaling.kind == "yarn" and rope_theta <= 1.0:
        raise ModelError(f"{origin}: rope_theta is {rope_theta}; yarn needs one above 1")


def limit_context(config_max_len: int, requested: int | None, origin: str) -> int:
    """The context length to serve: the model's own, or less if `requested` says so."""
    if requested is None:
        return config_max_len
    if not 1 <= requested <= config_max_len:
        raise ModelError(
            f"max_model_len is {requested}; {origin} allows 1 to {config_max_len} tokens"
        )
    return requested
