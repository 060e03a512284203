"""Weights from a Hugging Face directory of safetensors: one file, or shards with an index."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpu_worker.models.files import read_json_object
from wire.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsWeights:
    """A `WeightReader` over a directory. Files are mapped when first needed, and stay mapped."""

    def __init__(self, directory: Path) -> None:
        """Find the files. Raises ModelError if there are none, or the index is damaged."""
        self._directory = directory
        self._open_files: dict[str, Any] = {}
        if (directory / _INDEX).is_file():
            self._file_of = _read_index(directory / _INDEX)
        elif (directory / _SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._file(_SINGLE_FILE).keys(), _SINGLE_FILE)
        else:
            raise ModelError(
                f"{directory} has neither {_SINGLE_FILE} nor {_INDEX}; only safetensors "
                "checkpoints are read"
            )

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
        file_name = self._file_of[name]
        path = self._directory / file_name
        with _damage_as_model_error(path):
            stored = self._file(file_name).get_slice(name)
            self._check(path, name, tuple(stored.get_shape()), shape, stored.get_dtype())
            window = [slice(None) if r is None else slice(r.start, r.stop) for r in (rows, columns)]
            values: Tensor = stored[tuple(window[: len(shape)])]
        return values

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            path = self._directory / file_name
            with _damage_as_model_error(path):
                self._open_files[file_name] = safe_open(path, framework="pt", device="cpu")
        return self._open_files[file_name]

    @staticmethod
    def _check(
        path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...], dtype: str
    ) -> None:
        if found != expected:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(found)}, config.json says "
                f"{list(expected)}; the files do not belong together"
            )
        if dtype not in _DTYPES:
            raise ModelError(
                f"{path}: tensor {name} is stored as {dtype}; only {', '.join(_DTYPES)} are read"
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
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged or truncated ({error}); download it again") from error
