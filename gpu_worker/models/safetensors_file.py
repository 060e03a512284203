"""A safetensors file's directory: which tensors it holds, and where their bytes lie.

    length of the header: uint64, little-endian | header: JSON | the tensors' bytes

The header maps names to {"dtype", "shape", "data_offsets": [begin, end]}, counted from its own
end. Files come from strangers: everything is checked against the file before it is used. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from gpu_worker.models.mapped_file import MappedFile

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of the types that are read."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; `offset` is in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_directory(file: MappedFile) -> dict[str, StoredTensor]:
    """The tensors in `file`, by name. Raises ValueError, which says what is wrong with it."""
    if file.size_bytes < 8:
        raise ValueError(f"it has {file.size_bytes} bytes")
    header_bytes = int.from_bytes(file.map(0, 8).tobytes(), "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file.size_bytes - 8):
        raise ValueError(f"its header claims {header_bytes} of {file.size_bytes} bytes")
    try:
        header = json.loads(file.map(8, header_bytes).tobytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    start = 8 + header_bytes
    return {
        name: _tensor(name, entry, start, file.size_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor(name: str, entry: object, start: int, file_bytes: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"the header's entry for {name} is {entry!r:.80}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tensor {name} has shape {shape!r:.80}")
    if not 0 <= begin <= end <= file_bytes - start:
        raise ValueError(f"tensor {name} lies at bytes {begin} to {end} of {file_bytes - start}")
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"tensor {name} of shape {shape!r:.80} has {end - begin} bytes")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)
