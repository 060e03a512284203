"""Dequantizing slices of a GGUF file's tensors, without torch and without reading the rest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gpu_worker.models.gguf_file import GGUFFile, GGUFTensor
from wire.errors import ModelError

_PLAIN: dict[GGMLQuantizationType, type[np.generic]] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
}


class GGUFTensors:
    """The tensors of `file`, memory-mapped: only the pages that a slice touches are read."""

    def __init__(self, file: GGUFFile) -> None:
        """Map the file. The map lasts as long as this object or an array made from it."""
        self.file = file
        self._bytes = np.memmap(file.path, dtype=np.uint8, mode="r")

    def read(
        self, tensor: GGUFTensor, rows: range | None = None, columns: range | None = None
    ) -> npt.NDArray[np.floating]:
        """The slice `[rows, columns]` of a matrix, or `[rows]` of a vector.

        float32 for quantized tensors, the stored type for F16, F32 and F64. Column slices of
        quantized tensors are cut at block boundaries first, so nothing outside the blocks that
        they touch is dequantized.
        """
        matrix = self._stored_bytes(tensor)
        if len(tensor.shape) == 1:
            values: npt.NDArray[np.floating] = self._decode(matrix, tensor, rows)[0]
            return values
        if rows is not None:
            matrix = matrix[rows.start : rows.stop]
        return self._decode(matrix, tensor, columns)

    def _stored_bytes(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """(outer dimensions flattened, bytes of one row)."""
        end = tensor.offset + tensor.size_bytes
        if end > self._bytes.size:
            raise ModelError(f"{self.file.path} has shrunk while it was read; try again")
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return self._bytes[tensor.offset : end].reshape(num_rows, -1)

    def _decode(
        self, stored: npt.NDArray[np.uint8], tensor: GGUFTensor, columns: range | None
    ) -> npt.NDArray[np.floating]:
        columns = columns if columns is not None else range(tensor.shape[-1])
        block_len, block_bytes = GGML_QUANT_SIZES[tensor.quantization]
        first, last = columns.start // block_len, -(-columns.stop // block_len)
        blocks = stored[:, first * block_bytes : last * block_bytes]
        skipped = columns.start - first * block_len
        return self._dequantize(blocks, tensor)[:, skipped : skipped + len(columns)]

    def _dequantize(
        self, blocks: npt.NDArray[np.uint8], tensor: GGUFTensor
    ) -> npt.NDArray[np.floating]:
        plain = _PLAIN.get(tensor.quantization)
        if plain is not None:
            return np.ascontiguousarray(blocks).view(plain)
        try:
            values: npt.NDArray[np.floating] = dequantize(
                np.ascontiguousarray(blocks), tensor.quantization
            )
            return values
        except (NotImplementedError, KeyError, ValueError) as error:
            raise ModelError(
                f"{self.file.path}: tensor {tensor.name} is stored as "
                f"{tensor.quantization.name}, which cannot be dequantized here; "
                "use a Q4_0, Q4_1, Q5, Q6_K, Q8_0, F16, BF16 or F32 file"
            ) from error


def read_float_vector(file: GGUFFile, name: str) -> tuple[float, ...]:
    """A small vector of the file, whole."""
    tensor = file.tensors[name]
    if len(tensor.shape) != 1:
        raise ModelError(f"{file.path}: tensor {name} has shape {tensor.shape}; damaged file")
    return tuple(GGUFTensors(file).read(tensor).astype(np.float64).tolist())
