"""A GGUF file's directory: its metadata, and where each tensor's bytes lie.

The `gguf` package's own reader makes one numpy view per string, which costs seconds for a
vocabulary; this one reads it in hundredths and checks every length against the end of
the file, since model files come from strangers. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.models.ggml_types import GGML_TYPES, GGMLType
from wire.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF value type -> struct code."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in elements, outermost first; `offset` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLType
    offset: int
    size_bytes: int


class GGUFFile:
    """The directory of one GGUF file, read whole; tensors stay on disk.

    `metadata` maps keys to str, int, float, bool or lists of these.
    """

    def __init__(self, path: Path) -> None:
        """Read the directory. Raises ModelError if the file is damaged or of another format."""
        self.path = path
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                self._read(_Cursor(m, path))
        except FileNotFoundError as error:
            raise ModelError(f"{path} does not exist") from error
        except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
            raise ModelError(f"{path} cannot be read: {error}") from error

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != _MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file (its first bytes are not 'GGUF')")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise ModelError(f"{self.path}: GGUF version {version} is not supported; 2 and 3 are")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(int(num_fields)):
            key = cursor.string()
            self.metadata[key] = cursor.value(int(cursor.scalar("I")))
        for _ in range(int(num_tensors)):
            tensor = self._tensor(cursor)
            if tensor.name in self.tensors:
                raise ModelError(f"{self.path}: tensor {tensor.name} is there twice; damaged file")
            self.tensors[tensor.name] = tensor
        self._place_tensors(cursor)

    def _tensor(self, cursor: _Cursor) -> GGUFTensor:
        name = cursor.string()
        num_dimensions = int(cursor.scalar("I"))
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ModelError(f"{self.path}: tensor {name} has {num_dimensions} dimensions; damaged")
        # GGUF lists the innermost dimension first.
        shape = tuple(int(cursor.scalar("Q")) for _ in range(num_dimensions))[::-1]
        type_id = int(cursor.scalar("I"))
        offset = int(cursor.scalar("Q"))
        if type_id not in GGML_TYPES:
            raise ModelError(f"{self.path}: tensor {name} has unknown type {type_id}")
        quantization = GGML_TYPES[type_id]
        if math.prod(shape) == 0 or shape[-1] % quantization.block_len:
            raise ModelError(f"{self.path}: tensor {name} has shape {shape}; damaged file")
        size_bytes = math.prod(shape) // quantization.block_len * quantization.block_bytes
        return GGUFTensor(name, shape, quantization, offset, size_bytes)

    def _place_tensors(self, cursor: _Cursor) -> None:
        """Turn offsets that count from the aligned end of the directory into file offsets."""
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: alignment {alignment} is not a power of two; damaged")
        start = (cursor.position + alignment - 1) // alignment * alignment
        for name, tensor in self.tensors.items():
            placed = GGUFTensor(
                name, tensor.shape, tensor.quantization, start + tensor.offset, tensor.size_bytes
            )
            end = placed.offset + placed.size_bytes
            if end > cursor.size:
                raise ModelError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end} of "
                    f"{cursor.size}; download it again"
                )
            self.tensors[name] = placed


class _Cursor:
    """Reads little-endian values one after another, never beyond the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.position = 0
        self.size = len(data)
        self._data = data
        self._path = path

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            raise self._truncated(end)
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def scalar(self, code: str) -> int | float:
        value: int | float = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def string(self) -> str:
        try:
            return self.take(int(self.scalar("Q"))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self._path}: a string is not UTF-8; damaged file") from error

    def value(self, type_id: int) -> object:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array()
        if type_id not in _SCALARS:
            raise ModelError(f"{self._path}: unknown metadata type {type_id}; damaged file")
        value = self.scalar(_SCALARS[type_id])
        return bool(value) if type_id == _BOOL else value

    def _array(self) -> list[object]:
        type_id, count = int(self.scalar("I")), int(self.scalar("Q"))
        if type_id == _STRING:
            # Each string takes at least its length field, which bounds a hostile count.
            if count * 8 > self.size - self.position:
                raise ModelError(f"{self._path} is truncated or damaged: {count} strings wanted")
            return self._strings(count)
        if type_id not in _SCALARS:
            raise ModelError(f"{self._path}: arrays of metadata type {type_id} are not supported")
        code = _SCALARS[type_id]
        raw = self.take(count * struct.calcsize("<" + code))
        values = list(struct.unpack(f"<{count}{code}", raw))
        return [bool(v) for v in values] if type_id == _BOOL else values

    def _strings(self, count: int) -> list[object]:
        """As `count` calls of `string`, in a third of the time: vocabularies have 100,000."""
        data, size, position = self._data, self.size, self.position
        read_len = struct.Struct("<Q").unpack_from
        strings: list[object] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_len(data, position)[0]
                if position > size:
                    break
                strings.append(data[start:position].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ModelError(f"{self._path}: a string is not UTF-8; damaged file") from error
        except struct.error:
            position += 8  # where the length that is not there would have ended
        if position > size:
            raise self._truncated(position)
        self.position = position
        return strings

    def _truncated(self, wanted: int) -> ModelError:
        return ModelError(
            f"{self._path} is truncated or damaged: byte {wanted} is wanted, it has {self.size}"
        )
