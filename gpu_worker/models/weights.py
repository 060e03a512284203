"""The one seam through which weights are read: "give me this tensor, rows a:b or columns a:b"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.content_digest import StoredBytes
from gpu_worker.models.files import model_kind
from gpu_worker.models.gguf_config import read_gguf_config
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_weights import GGUFWeights
from gpu_worker.models.hf_config import read_hf_config
from gpu_worker.models.safetensors_weights import SafetensorsWeights


class WeightReader(Protocol):
    """A checkpoint, whatever its format. Tensors go by their Hugging Face names."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """One slice of the tensor `name`, on the CPU, in the precision that it is stored in.

        `shape` is the whole tensor's; a checkpoint that has another is refused. `rows` cuts the
        first dimension, `columns` the second; None takes all. Only what the rows cover is read
        from the disk. What is stored as a plain type comes as a view of the file, which counts
        as memory of ours until it is let go of: copy what is to last, and pack the rest soon.
        May be called from several threads. Raises ModelError for a missing, damaged or
        unsupported tensor.
        """

    def stored(self) -> Iterable[StoredBytes]:
        """All tensors as they are stored, under whatever names. Raises ModelError."""


def open_model(path: Path, max_model_len: int | None = None) -> tuple[ModelConfig, WeightReader]:
    """The configuration of the model at `path`, and a reader for its weights.

    `path` is a Hugging Face directory or a .gguf file. Raises ModelError.
    """
    if model_kind(path) == "gguf":
        file = GGUFFile(path)
        config = read_gguf_config(file, max_model_len)
        return config, GGUFWeights(file, config)
    return read_hf_config(path, max_model_len), SafetensorsWeights(path)
