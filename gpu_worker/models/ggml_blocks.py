"""Fast dequantization of GGML's most used block formats: bytes of blocks to float32.

A row is a sequence of blocks of 32 (or, in the K formats, 256) values, each with its scales in
front of or behind its integers. Where there are no compiled kernels, numpy handles many blocks per
call, a few thousand at a time, so that what it makes on the way stays in the processor's cache; the
results are the same, bit for bit. Formats:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gpu_worker.kernels.dequantize import dequantize
from gpu_worker.models.ggml_types import GGMLType

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

_CHUNK_VALUES = 1 << 16
"""256 KiB of float32."""


def dequantize_blocks(rows: Bytes, kind: GGMLType) -> Floats | None:
    """(rows, bytes) of whole blocks -> (rows, values); None for a format that is not known here.

    `rows` may be a view with gaps between its rows.
    """
    decode = _DECODERS.get(kind.name)
    if decode is None:
        return None
    num_rows, num_row_bytes = rows.shape
    blocks_per_row = num_row_bytes // kind.block_bytes
    values: Floats = np.empty((num_rows, blocks_per_row * kind.block_len), dtype=np.float32)
    if dequantize(rows, kind.number, kind.block_bytes, values):
        return values
    rows_at_once = max(1, _CHUNK_VALUES // max(values.shape[1], 1))
    for start in range(0, num_rows, rows_at_once):
        chunk = np.ascontiguousarray(rows[start : start + rows_at_once])
        out = values[start : start + rows_at_once]
        decode(chunk.reshape(-1, kind.block_bytes), out.reshape(-1, kind.block_len))
    return values


def _scales(blocks: Bytes, start: int, count: int = 1) -> Floats:
    """(blocks, count): float16 numbers from byte `start` on."""
    raw = np.ascontiguousarray(blocks[:, start : start + 2 * count])
    return raw.view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The lower and the upper four bits of each byte."""
    lower: Bytes = packed & np.uint8(15)
    upper: Bytes = packed >> np.uint8(4)
    return lower, upper


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """float16 scale; 16 bytes, the first 16 values in the lower halves, 8 standing for 0."""
    scale = _scales(blocks, 0)
    for half, quants in zip((out[:, :16], out[:, 16:]), _nibbles(blocks[:, 2:]), strict=True):
        np.multiply(quants.view(np.int8) - np.int8(8), scale, out=half)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """float16 scale and minimum; 16 bytes, the first 16 values in the lower halves."""
    scale, minimum = _scales(blocks, 0), _scales(blocks, 2)
    for half, quants in zip((out[:, :16], out[:, 16:]), _nibbles(blocks[:, 4:]), strict=True):
        np.multiply(quants, scale, out=half)
    out += minimum


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """float16 scale; 32 signed bytes."""
    np.multiply(blocks[:, 2:].view(np.int8), _scales(blocks, 0), out=out)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """Eight groups of 32. Scale and minimum in float16; 12 bytes with six bits of scale and six
    of minimum for each group; 128 bytes, two groups sharing 32.

    Of the 12 bytes, the first four hold the scales of groups 0 to 3, the next four their minimums,
    the last four the lower halves of the scales and minimums of groups 4 to 7, whose upper two bits
    are those left over in the first eight.
    """
    packed = blocks[:, 4:16]
    lower, upper = _nibbles(packed[:, 8:])
    scales = np.concatenate([packed[:, :4] & 63, lower | (packed[:, :4] >> 6 << 4)], axis=1)
    minimums = np.concatenate([packed[:, 4:8] & 63, upper | (packed[:, 4:8] >> 6 << 4)], axis=1)
    group_scales = _scales(blocks, 0) * scales
    group_minimums = _scales(blocks, 2) * minimums
    quants = np.stack(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)), axis=2).reshape(-1, 8, 32)
    groups = out.reshape(-1, 8, 32)
    np.multiply(quants, group_scales[:, :, None], out=groups)
    groups -= group_minimums[:, :, None]


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """Sixteen groups of 16. 128 bytes with the lower four bits of each value, 64 with the upper
    two, 16 signed scales, and their common scale in float16; 32 stands for 0.

    Each half of the values takes 64 and 32 of these bytes, in four runs of 32 values: the lower
    bits of runs 0 and 2 share bytes, those of 1 and 3; the upper bits of all four share theirs.
    """
    lower = blocks[:, :128].reshape(-1, 2, 2, 32)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    quants = np.concatenate(_nibbles(lower), axis=2)
    quants |= (upper >> shifts & 3) << 4
    group_scales = _scales(blocks, 208) * blocks[:, 192:208].view(np.int8)
    signed = quants.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    np.multiply(signed, group_scales[:, :, None], out=out.reshape(-1, 16, 16))


def _bf16(blocks: Bytes, out: Floats) -> None:
    """The upper half of a float32."""
    np.left_shift(blocks.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


_DECODERS: dict[str, Callable[[Bytes, Floats], None]] = {
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
