"""Weights from a Hugging Face directory of safetensors: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.models.content_digest import StoredBytes
from gpu_worker.models.files import read_json_object
from gpu_worker.models.mapped_file import MappedFile
from gpu_worker.models.safetensors_file import StoredTensor, read_directory
from wire.errors import ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsWeights:
    """A `WeightReader` over a directory. Its tensors are views of the mapped files."""

    def __init__(self, directory: Path) -> None:
        """Find the files. Raises ModelError if there are none, or the index is damaged."""
        self._directory = directory
        if (directory / _INDEX).is_file():
            self._file_of = _read_index(directory / _INDEX)
        elif (directory / _SINGLE_FILE).is_file():
            self._file_of = {}
        else:
            raise ModelError(
                f"{directory} has neither {_SINGLE_FILE} nor {_INDEX}; only safetensors "
                "checkpoints are read"
            )
        names = set(self._file_of.values()) or {_SINGLE_FILE}
        self._files = {name: _File(directory / name) for name in names}
        if not self._file_of:
            self._file_of = dict.fromkeys(self._files[_SINGLE_FILE].tensors, _SINGLE_FILE)

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """See `WeightReader.read`."""
        if name not in self._file_of:
            raise ModelError(f"{self._directory}: tensor {name} is missing; download it again")
        return self._files[self._file_of[name]].read(name, shape, rows, columns)

    def stored(self) -> Iterator[StoredBytes]:
        """See `WeightReader.stored`."""
        for name, file_name in self._file_of.items():
            yield self._files[file_name].locate(name)


class _File:
    """One file, opened when something of it is first needed; then it stays open."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _mapped(self) -> MappedFile:
        with _damage_as_model_error(self._path):
            return MappedFile(self._path)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What the file holds. Raises ModelError."""
        with _damage_as_model_error(self._path):
            return read_directory(self._mapped)

    def read(
        self, name: str, shape: tuple[int, ...], rows: range | None, columns: range | None
    ) -> Tensor:
        """A slice of a tensor. Raises ModelError."""
        stored = self._find(name)
        self._check(name, stored, shape)
        rows = rows if rows is not None else range(shape[0])
        row_bytes = stored.size_bytes // shape[0]
        with _damage_as_model_error(self._path):
            # Of columns the whole rows: disks read more than a part of a row at a time anyway,
            # and what one rank leaves the next one takes.
            mapped = self._mapped.map(stored.offset + rows.start * row_bytes, len(rows) * row_bytes)
        values = torch.from_numpy(mapped).view(_DTYPES[stored.dtype]).view(len(rows), *shape[1:])
        return values if columns is None else values[:, columns.start : columns.stop]

    def locate(self, name: str) -> StoredBytes:
        """Where a tensor's bytes are. Raises ModelError."""
        stored = self._find(name)
        return StoredBytes(
            name, stored.dtype, stored.shape, self._mapped, stored.offset, stored.size_bytes
        )

    def _find(self, name: str) -> StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise ModelError(f"{self._path} is damaged: it has no tensor {name}; download it again")
        return stored

    def _check(self, name: str, stored: StoredTensor, expected: tuple[int, ...]) -> None:
        if stored.shape != expected:
            raise ModelError(
                f"{self._path}: tensor {name} has shape {list(stored.shape)}, config.json says "
                f"{list(expected)}; the files do not belong together"
            )
        if stored.dtype not in _DTYPES:
            raise ModelError(
                f"{self._path}: tensor {name} is stored as {stored.dtype}; "
                f"only {', '.join(_DTYPES)} are read"
            )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{path}: field weight_map is missing; download it again")
    for name, file_name in weight_map.items():
        # An index from a stranger must not lead out of the model's directory.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelError(f"{path}: tensor {name} lies in {file_name!r}, which is no file name")
    return weight_map


@contextmanager
def _damage_as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; the model directory is incomplete") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged or truncated ({error}); download it again") from error
