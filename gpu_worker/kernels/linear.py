"""Linear layers on packed weights: the CPU's own layouts of a weight matrix, and their product."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from gpu_worker.kernels.library import INT64, POINTER, function

_GATE_COLUMNS = 16
_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What weights are packed from as they are; other types become float32 first."""


class Layout(IntEnum):
    """How weights lie in memory; the numbers are those of `src/linear.h`.

    Panels multiply in float32 arithmetic. Tiles are for AMX: exact products of bfloat16 terms,
    summed in float32. Groups are integers with a scale for 64 inputs each (`src/grouped.h`), and
    so are the activations that they are multiplied by; those for int4, whose groups are of 32
    inputs, are int16.
    """

    FLOAT32_PANELS = 0
    BFLOAT16_PANELS = 1
    BFLOAT16_TILES = 2
    INT16_GROUPS = 3
    INT8_GROUPS = 4
    INT4_GROUPS = 5


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A layout, and for bfloat16 tiles the number of terms that each activation is split into:
    one has 8 bits of precision, two have 16, three are as good as float32.
    """

    layout: Layout
    num_terms: int = 1


class PackedLinear:
    """values (rows, inputs) float32 -> values W^T + bias (rows, outputs) float32.

    With `gated`, W is gates over ups, as many of each, and the result is silu(values gates^T) *
    (values ups^T), of half as many columns. `num_bytes` is the memory that the weights take.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_format: WeightFormat,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> None:
        """Pack `weight` (rows of W, inputs), of any floating type; `bias` (outputs,)."""
        assert not (gated and bias is not None), "the kernels gate sums without a bias"
        layout = int(weight_format.layout)
        self.num_outputs = len(weight) // 2 if gated else len(weight)
        self._bias = None if bias is None else bias.float().contiguous()
        source = weight if weight.dtype in _ELEMENTS else weight.float()
        source = source if source.stride(1) == 1 else source.contiguous()
        num_rows, num_inputs = source.shape
        if gated:
            num_rows = 2 * (-(-self.num_outputs // _GATE_COLUMNS) * _GATE_COLUMNS)
        size = ctypes.c_int64()
        function("fb_linear_packed_bytes", INT64, INT64, INT64, POINTER)(
            layout, num_rows, num_inputs, ctypes.byref(size)
        )
        self.num_bytes = size.value
        self._packed = torch.empty(self.num_bytes, dtype=torch.uint8)
        function("fb_linear_pack", *[INT64] * 3, POINTER, *[INT64] * 4, POINTER)(
            layout,
            num_rows,
            num_inputs,
            source.data_ptr(),
            _ELEMENTS[source.dtype],
            source.stride(0) * source.itemsize,
            len(source),
            int(gated),
            self._packed.data_ptr(),
        )
        self._kernel = function("fb_linear", *[INT64] * 6, *[POINTER] * 3, INT64, POINTER)
        self._fixed_arguments = (
            layout,
            num_rows,
            num_inputs,
            weight_format.num_terms,
            self.num_outputs,
            int(gated),
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )

    def __call__(self, values: Tensor) -> Tensor:
        """`values` must be contiguous."""
        num_rows = values.shape[0]
        out = torch.empty(num_rows, self.num_outputs)
        self._kernel(*self._fixed_arguments, values.data_ptr(), num_rows, out.data_ptr())
        return out
