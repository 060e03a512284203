"""In what numbers the KV-cache's pages hold keys and values.

The 8-bit formats keep a scale for each row, the head_dim numbers of one token, head, and key or
value: value = element * scale. The scale follows from the row alone,

    scale = greatest magnitude / greatest element, rounded up to bfloat16

so there is nothing to calibrate, a token's numbers are written once and never touched again, and
a row's bits do not depend on what lies beside it: not on other tokens, nor on the heads that a
rank holds. Rounded up, a scale never lets an element overflow; the error of its rounding is none,
since rows are divided by the scale as it is kept.

- fp8: e4m3, 3 bits of mantissa (OCP 8-bit floating point, arXiv 2209.05433)
- int8: whole numbers from -127 to 127, of keys that were mixed before (`cache/key_mixing.py`)

A row with a number that is none (NaN or infinite) has an infinite scale and elements of 0, and so
reads as NaN, as it must: the engine finds broken requests by their logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class PageFormat:
    """A format. `greatest` is the greatest magnitude of an element where rows have scales.

    `mixes_keys`: what is stored is mixed, and so must be the queries. Whoever stores does it.
    """

    name: str
    dtype: torch.dtype
    greatest: float | None = None
    mixes_keys: bool = False

    @property
    def has_scales(self) -> bool:
        """Whether each row has a scale beside its elements."""
        return self.greatest is not None

    def narrow(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Elements (..., head_dim) for `rows` of that shape, and their scales (...) if there are.

        What our kernels write is the same to the bit.
        """
        if self.greatest is None:
            return rows.to(self.dtype), None
        rows = rows.float()
        scales = _round_up_to_bfloat16(rows.abs().amax(dim=-1) / self.greatest)
        # Beside a scale of 0 (rows of zeros, or nearly) and an infinite one elements are 0.
        counts = ((scales > 0) & scales.isfinite())[..., None]
        ratios = torch.where(counts, rows / scales[..., None], 0.0)
        if not self.dtype.is_floating_point:
            ratios = ratios.round()
        return ratios.to(self.dtype), scales.to(SCALE_DTYPE)

    def widen(self, elements: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What `narrow` made of rows, as numbers of `dtype`."""
        if scales is None:
            return elements.to(dtype)
        return (elements.float() * scales.float()[..., None]).to(dtype)


FLOAT32 = PageFormat("float32", torch.float32)
FLOAT16 = PageFormat("fp16", torch.float16)
BFLOAT16 = PageFormat("bf16", torch.bfloat16)
FP8 = PageFormat("fp8", torch.float8_e4m3fn, greatest=448.0)
INT8 = PageFormat("int8", torch.int8, greatest=127.0, mixes_keys=True)

PAGE_FORMATS = {form.name: form for form in (FLOAT32, FLOAT16, BFLOAT16, FP8, INT8)}


def _round_up_to_bfloat16(values: Tensor) -> Tensor:
    """The least bfloat16 numbers, held as float32, that are not below `values`, 0 or more; infinity
    for those that are none.
    """
    up = ((values.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), up, torch.inf)
