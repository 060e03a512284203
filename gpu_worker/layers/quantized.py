"""Narrow weights for torch's operations: a fallback that saves memory, and no time.

The same numbers as in our CPU kernels, which quantize the activations as well; here weights are
widened whenever they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from gpu_worker.precision import INT4_GROUP, INT8_GROUP

_TINY = torch.finfo(torch.float32).tiny


class Int8Product:
    """Symmetric weights. A group is mixed by a Hadamard transform before it is rounded, so that no
    value stands out.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Quantize `weight` (outputs, inputs); `bias` (outputs,) and products are `dtype`."""
        self._num_inputs = weight.shape[1]
        self._mixing = hadamard(INT8_GROUP).to(weight.device)
        mixed = _groups(weight, INT8_GROUP) @ self._mixing
        scales = mixed.abs().amax(dim=2, keepdim=True) / 127
        self._quantized = (mixed / scales.clamp(min=_TINY)).round().to(torch.int8)
        self._scales = scales / INT8_GROUP
        self._bias = bias
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self._quantized.nbytes + self._scales.nbytes

    def __call__(self, values: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        wide = (self._quantized * self._scales) @ self._mixing
        weight = wide.flatten(1)[:, : self._num_inputs].to(self._dtype)
        return linear(values, weight, self._bias)


class Int4Product:
    """Weights from a group's minimum up in 15 steps. Two of them share a byte."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Quantize `weight` (outputs, inputs); `bias` (outputs,) and products are `dtype`."""
        self._num_inputs = weight.shape[1]
        # Repeated to the end of its group, the last input leaves that group's minimum as it is.
        filling = weight[:, -1:].expand(-1, -self._num_inputs % INT4_GROUP)
        groups = _groups(torch.cat((weight, filling), dim=1), INT4_GROUP)
        self._minima = groups.amin(dim=2, keepdim=True).half()
        self._scales = ((groups.amax(dim=2, keepdim=True) - groups.amin(2, True)) / 15).half()
        steps = (groups - self._minima.float()) / self._scales.float().clamp(min=_TINY)
        quantized = (steps.clamp(0, 15) + 0.5).to(torch.uint8)
        self._quantized = quantized[..., 0::2] | quantized[..., 1::2] << 4
        self._bias = bias
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self._quantized.nbytes + self._scales.nbytes + self._minima.nbytes

    def __call__(self, values: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        steps = torch.stack((self._quantized & 15, self._quantized >> 4), dim=3).flatten(2)
        wide = steps * self._scales.float() + self._minima.float()
        weight = wide.flatten(1)[:, : self._num_inputs].to(self._dtype)
        return linear(values, weight, self._bias)


def hadamard(size: int) -> Tensor:
    """The (size, size) Hadamard matrix of Sylvester: entries 1 and -1; times itself, size * I."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat(
            (torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1))
        )
    return matrix


def _groups(weight: Tensor, size: int) -> Tensor:
    """(outputs, inputs) -> (outputs, groups, size) float32; the last group is filled with zeros."""
    padded = pad(weight.float(), (0, -weight.shape[1] % size))
    return padded.view(len(weight), -1, size)
