"""Dequantizing slices of a GGUF file's tensors, without torch and without reading the rest."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu_worker.models.ggml_blocks import dequantize_blocks
from gpu_worker.models.gguf_file import GGUFFile, GGUFTensor
from gpu_worker.models.mapped_file import MappedFile
from wire.errors import ModelError

_PLAIN: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
}


class GGUFTensors:
    """The tensors of `file`: only the rows that a slice touches are mapped and read."""

    def __init__(self, file: GGUFFile) -> None:
        """Open the file again. Raises ModelError if it has gone meanwhile."""
        self.file = file
        try:
            self.mapped = MappedFile(file.path)
        except OSError as error:
            raise ModelError(f"{file.path} cannot be read: {error}") from error

    def read(
        self, tensor: GGUFTensor, rows: range | None = None, columns: range | None = None
    ) -> npt.NDArray[np.floating]:
        """The slice `[rows, columns]` of a matrix, or `[rows]` of a vector.

        float32 for quantized tensors; for F16, F32 and F64 the stored type, and a view of the file.
        Column slices of quantized tensors are cut at block boundaries first, so nothing outside
        the blocks that they touch is dequantized.
        """
        if len(tensor.shape) == 1:
            stored = self._stored_bytes(tensor, range(1))
            values: npt.NDArray[np.floating] = self._decode(stored, tensor, rows)[0]
            return values
        stored = self._stored_bytes(tensor, rows)
        return self._decode(stored, tensor, columns)

    def _stored_bytes(self, tensor: GGUFTensor, rows: range | None) -> npt.NDArray[np.uint8]:
        """(outer dimensions flattened, bytes of one row)."""
        num_rows = math.prod(tensor.shape[:-1])
        rows = rows if rows is not None else range(num_rows)
        row_bytes = tensor.size_bytes // num_rows
        offset, size_bytes = tensor.offset + rows.start * row_bytes, len(rows) * row_bytes
        try:
            stored = self.mapped.map(offset, size_bytes)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{self.file.path} cannot be read any more ({error}); was it changed?"
            ) from error
        return stored.reshape(len(rows), row_bytes)

    def _decode(
        self, stored: npt.NDArray[np.uint8], tensor: GGUFTensor, columns: range | None
    ) -> npt.NDArray[np.floating]:
        columns = columns if columns is not None else range(tensor.shape[-1])
        kind = tensor.quantization
        block_len, block_bytes = kind.block_len, kind.block_bytes
        first, last = columns.start // block_len, -(-columns.stop // block_len)
        blocks = stored[:, first * block_bytes : last * block_bytes]
        skipped = columns.start - first * block_len
        return self._dequantize(blocks, tensor)[:, skipped : skipped + len(columns)]

    def _dequantize(
        self, blocks: npt.NDArray[np.uint8], tensor: GGUFTensor
    ) -> npt.NDArray[np.floating]:
        plain = _PLAIN.get(tensor.quantization.name)
        if plain is not None:
            return np.ascontiguousarray(blocks).view(plain)
        values: npt.NDArray[np.floating] | None
        values = dequantize_blocks(blocks, tensor.quantization)
        if values is not None:
            return values
        # The rarer formats; imported late, as it takes a tenth of a second.
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values = dequantize(
                np.ascontiguousarray(blocks), GGMLQuantizationType[tensor.quantization.name]
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
