"""Rotary position embedding (arXiv 2104.09864) with the frequency scalings in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.models.config import ModelConfig, RopeScaling
from wire.errors import ModelError


@dataclass(frozen=True, slots=True)
class Rotation:
    """One step's angles: `cos` and `sin` (num_tokens, 1, head_dim / 2). All layers share them."""

    cos: Tensor
    sin: Tensor

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate `heads` (num_tokens, heads, head_dim): element i with element i + head_dim/2."""
        first, second = heads.chunk(2, dim=-1)
        return torch.cat(
            (first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1
        )


class RotaryEmbedding:
    """Turns positions into rotations. Frequencies stay in float32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """Compute the model's frequencies."""
        frequencies = _base_frequencies(config.head_dim, config.rope_theta)
        frequencies, self._amplitude = _scale(frequencies, config)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Angles for `positions` (num_tokens,)."""
        angles = positions.to(torch.float32)[:, None, None] * self._frequencies
        return Rotation(
            (angles.cos() * self._amplitude).to(dtype), (angles.sin() * self._amplitude).to(dtype)
        )


def _base_frequencies(head_dim: int, theta: float) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def _scale(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """The scaled frequencies, and the factor that cos and sin are multiplied by."""
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor, 1.0
        case "factors":
            factors = torch.tensor(scaling.frequency_factors, dtype=torch.float32)
            if factors.shape != frequencies.shape or not bool((factors > 0).all()):
                raise ModelError(
                    f"rotary frequency factors must be {len(frequencies)} positive numbers; "
                    "the model file is damaged"
                )
            return frequencies / factors, 1.0
        case "llama3":
            return _llama3(frequencies, scaling), 1.0
        case "yarn":
            return _yarn(frequencies, scaling, config)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_len / wavelengths - low) / (high - low)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): like llama3's blend, over dimensions, with warmer attention."""
    half = len(frequencies)

    def dimension_of(num_rotations: float) -> float:
        """The dimension that turns `num_rotations` times within the original context."""
        ratio = scaling.original_max_len / (num_rotations * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    blended = frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return blended, amplitude
