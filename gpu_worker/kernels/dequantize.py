"""Dequantizing GGML's block formats by compiled code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu_worker.kernels.library import INT64, POINTER, function, isa

KNOWN_TYPES = frozenset((2, 3, 8, 12, 14))
"""Q4_0, Q4_1, Q8_0, Q4_K and Q6_K, as GGUF numbers them."""


def dequantize(
    rows: npt.NDArray[np.uint8], type_number: int, block_bytes: int, out: npt.NDArray[np.float32]
) -> bool:
    """Fill `out` (rows, values) from `rows` (rows, bytes), which may lie apart from each other.

    False, and nothing done, without kernels or for a type that they do not know. Other Python
    threads run meanwhile.
    """
    if type_number not in KNOWN_TYPES or isa() is None:
        return False
    assert rows.strides[1] == 1
    assert out.flags.c_contiguous
    num_rows, row_bytes = rows.shape
    function("fb_dequantize", *[INT64] * 4, POINTER, POINTER)(
        type_number,
        num_rows,
        row_bytes // block_bytes,
        rows.strides[0],
        rows.ctypes.data,
        out.ctypes.data,
    )
    return True
