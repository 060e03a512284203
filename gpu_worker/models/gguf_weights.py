"""Weights from a GGUF file, under their Hugging Face names and in their Hugging Face order."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.content_digest import StoredBytes
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_tensors import GGUFTensors
from wire.errors import ModelError

_WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """What GGUF calls the tensor that Hugging Face calls `name`."""
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match is not None, name
    layer, part, kind = match.groups()
    return f"blk.{layer}.{_PER_LAYER[part]}.{kind}"


class GGUFWeights:
    """A `WeightReader` over a GGUF file: a slice is dequantized to float32 as it is read."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """Open the file. `config` tells whether its query and key rows are permuted."""
        self._file = file
        self._tensors = GGUFTensors(file)
        self._config = config

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """See `WeightReader.read`."""
        stored_name = gguf_name(name)
        tensor = self._file.tensors.get(stored_name)
        if tensor is None:
            raise ModelError(
                f"{self._file.path}: tensor {stored_name} is missing; the file is damaged"
            )
        if tensor.shape != shape:
            raise ModelError(
                f"{self._file.path}: tensor {stored_name} has shape {list(tensor.shape)}, its "
                f"metadata say {list(shape)}; the file is damaged"
            )
        values = self._tensors.read(tensor, rows, columns)
        if self._is_permuted(name):
            values = _unpermuted(values, self._config.head_dim)
        # A plain F32 tensor is still a view of the file, in which it may lie anywhere.
        return torch.from_numpy(values if values.flags.aligned else values.copy())

    def stored(self) -> Iterator[StoredBytes]:
        """See `WeightReader.stored`."""
        for tensor in self._file.tensors.values():
            yield StoredBytes(
                tensor.name,
                tensor.quantization.name,
                tensor.shape,
                self._tensors.mapped,
                tensor.offset,
                tensor.size_bytes,
            )

    def _is_permuted(self, name: str) -> bool:
        """llama.cpp reorders the rotated halves of Llama's heads, but not of Qwen's."""
        return self._config.architecture == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        )


def _unpermuted(values: npt.NDArray[np.floating], head_dim: int) -> npt.NDArray[np.floating]:
    """Put each head's rows back from llama.cpp's rotary layout into Hugging Face's.

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates halves
    (0, d/2), (1, d/2 + 1), ... So row 2 * i + j of a head goes to row j * d/2 + i.
    """
    num_rows, num_columns = values.shape
    assert num_rows % head_dim == 0, "slices of q and k are cut between heads"
    heads = values.reshape(num_rows // head_dim, head_dim // 2, 2, num_columns)
    return heads.swapaxes(1, 2).reshape(num_rows, num_columns)
