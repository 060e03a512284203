"""In what numbers a model is held and computed: chosen once, for this machine, and said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import structlog
import torch

from cache.page_formats import BFLOAT16, FLOAT16, FLOAT32, PAGE_FORMATS, PageFormat
from gpu_worker.kernels import library, pages
from gpu_worker.kernels.library import Isa
from wire.errors import ConfigError

if TYPE_CHECKING:
    from service.settings import KVCacheDtype, Quantization

Role: TypeAlias = Literal["qkv", "attention_output", "gate_up", "down", "head"]
"""Which of a model's matrices a product is: quantization treats some with more care."""

INT8_GROUP = 64
INT4_GROUP = 32
"""Inputs that share a scale. Ranks split inputs between groups, so that a model is quantized in
the same way at every tensor-parallel size."""

_INT8_ROLES = frozenset[Role]({"gate_up"})
"""What int8 quantization narrows: half of the weights, for a fifth of the noise that all of them
would make (docs/QUANTIZATION.md). The others stay in the 16 bits of the dtype."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` is what weights are held in, those that are not quantized.

    `isa` is what our CPU kernels may use, which then compute in float32 or as good as that; None
    where torch's operations compute, in `dtype`. `pages` is what the KV-cache holds.
    """

    dtype: torch.dtype
    quantization: Quantization
    isa: Isa | None
    pages: PageFormat

    def weight_bits(self, role: Role) -> Literal[4, 8] | None:
        """What the matrices of `role` are quantized to, if they are."""
        if self.quantization == "int4":
            return 8 if role == "head" else 4
        return 8 if self.quantization == "int8" and role in _INT8_ROLES else None

    @property
    def name(self) -> str:
        """Names what changes keys and values for the same tokens, `pages` apart."""
        dtype = str(self.dtype).removeprefix("torch.")
        return dtype if self.quantization == "none" else f"{dtype}+{self.quantization}"


def choose_precision(
    dtype: str,
    quantization: Quantization,
    kv_cache_dtype: KVCacheDtype,
    device: torch.device,
    *,
    head_dim: int,
) -> Precision:
    """What to use for these options; `dtype` is "auto" or a torch dtype's name.

    `head_dim` is the model's: our kernels do not work on all. Raises ConfigError for a dtype that
    is not supported.
    """
    log = structlog.get_logger(__name__)
    isa = _usable_isa(device, head_dim)
    if dtype == "auto":
        name, reason = _fastest(device, isa)
    elif dtype in _DTYPES:
        name, reason = dtype, "it was asked for"
    else:
        raise ConfigError(f"dtype is {dtype}; it must be auto, {', '.join(_DTYPES)}")
    page_format = _page_format(kv_cache_dtype, _DTYPES[name], isa)
    log.info(
        "precision_chosen",
        dtype=name,
        quantization=quantization,
        kv_cache_dtype=page_format.name,
        isa=isa,
        reason=reason,
    )
    return Precision(_DTYPES[name], quantization, isa, page_format)


def _page_format(kv_cache_dtype: KVCacheDtype, dtype: torch.dtype, isa: Isa | None) -> PageFormat:
    if kv_cache_dtype != "auto":
        return PAGE_FORMATS[kv_cache_dtype]
    if dtype == torch.float32:
        return FLOAT32
    # Our kernels widen whatever they read: of the 16-bit formats they take the one with the more
    # precise numbers, also beside bfloat16 weights.
    return FLOAT16 if isa is not None or dtype == torch.float16 else BFLOAT16


def _usable_isa(device: torch.device, head_dim: int) -> Isa | None:
    """What our kernels may use for such a model; None, and the reason in the log, without them."""
    isa = library.isa() if device.type == "cpu" else None
    if isa is None:
        return None
    # All that they may refuse of a model: sizes of every other kind, and dtypes, they take.
    reason = pages.reason_against(head_dim)
    if reason is None:
        return isa
    structlog.get_logger(__name__).warning("cpu_kernels_unfit", reason=reason)
    return None


def _fastest(device: torch.device, isa: Isa | None) -> tuple[str, str]:
    if device.type != "cpu":
        return "bfloat16", f"{device.type} multiplies 16-bit matrices fastest"
    if isa == "amx":
        return "bfloat16", "AMX multiplies bfloat16 several times as fast as AVX-512 does float32"
    if isa == "avx512":
        return "float16", "VNNI multiplies 16-bit integers at up to twice the rate of float32"
    return "float32", "torch multiplies 16-bit matrices no faster on this processor"
