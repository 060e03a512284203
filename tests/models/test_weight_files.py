"""Reading weights: mapped pieces of files, safetensors directories, GGML's block formats."""

from __future__ import annotations

import gc
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gpu_worker.kernels import library
from gpu_worker.kernels.dequantize import KNOWN_TYPES, dequantize
from gpu_worker.models import ggml_blocks
from gpu_worker.models.fetching import fetch_ahead
from gpu_worker.models.ggml_blocks import dequantize_blocks
from gpu_worker.models.ggml_types import GGML_TYPES
from gpu_worker.models.mapped_file import MappedFile
from gpu_worker.models.safetensors_weights import SafetensorsWeights
from wire.errors import ModelError


def num_mappings(path: Path) -> int:
    """How often this process has the file mapped."""
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_mapped_piece_lasts_as_long_as_what_looks_at_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 100)
    file = MappedFile(path)
    piece = file.map(4999, 7)
    assert piece.tolist() == [(4999 + i) % 256 for i in range(7)]
    view = piece[2:]
    del piece
    assert num_mappings(path) == 1
    assert view[0] == 5001 % 256
    del view
    gc.collect()
    assert num_mappings(path) == 0
    with pytest.raises(ValueError, match="greater than file size"):
        file.map(25_000, 700)


def safetensors(header: object, data: bytes = bytes(8)) -> bytes:
    """A file with this header, which may be bytes that are no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    """A header with one tensor of eight bytes."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 2**63) + bytes(50), "its header claims 9223372036854775808 of 58 bytes"),
        (safetensors(b"{" + bytes(20)), "Expecting property name"),
        (safetensors(b"\xff" * 20), "can't decode byte"),
        (safetensors(b"[" * 90_000), "nested too deeply"),
        (safetensors([1, 2]), "no JSON object"),
        (safetensors({"w": [0, 8]}), r"the header's entry for w is \[0, 8\]"),
        (safetensors(entry(data_offsets=[0, 9])), "lies at bytes 0 to 9 of 8"),
        (safetensors(entry(data_offsets=[-8, 0])), "lies at bytes -8 to 0 of 8"),
        (safetensors(entry(data_offsets=[8, 0])), "lies at bytes 8 to 0 of 8"),
        (safetensors(entry(shape=[3])), r"of shape \[3\] has 8 bytes"),
        (safetensors(entry(shape=[-2])), r"has shape \[-2\]"),
        (safetensors(entry(shape=[True, 2])), r"has shape \[True, 2\]"),
    ],
)
def test_a_damaged_safetensors_file_says_what_is_wrong(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        SafetensorsWeights(tmp_path)
    assert str(path) in str(caught.value)
    assert "is damaged or truncated" in str(caught.value)


def test_the_index_may_name_a_tensor_that_its_file_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors(entry()))
    index = {"weight_map": {"v": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"a\.safetensors is damaged: it has no tensor v"):
        SafetensorsWeights(tmp_path).read("v", (2,))


def test_block_types_are_those_of_the_gguf_package() -> None:
    for kind in GGML_TYPES.values():
        theirs = GGMLQuantizationType[kind.name]
        assert (theirs.value, GGML_QUANT_SIZES[theirs]) == (
            kind.number,
            (kind.block_len, kind.block_bytes),
        )


@pytest.mark.skipif(library.isa() is None, reason="this processor has no kernels")
@pytest.mark.parametrize("number", sorted(KNOWN_TYPES))
def test_compiled_and_numpy_dequantization_agree_bit_for_bit(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = GGML_TYPES[number]
    # Any bytes are blocks; below 60, their scales are finite numbers. Rows have gaps.
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 60, size=(5, 512 // kind.block_len * kind.block_bytes + 3), dtype="u1")
    rows = rows[:, :-3]
    compiled = np.empty((5, 512), dtype=np.float32)
    assert dequantize(rows, number, kind.block_bytes, compiled)
    monkeypatch.setattr(ggml_blocks, "dequantize", lambda *_: False)
    by_numpy = dequantize_blocks(rows, kind)
    assert by_numpy is not None
    np.testing.assert_array_equal(compiled, by_numpy)


def test_fetching_ahead_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    fetch_ahead(tmp_path / "nothing")
    (tmp_path / "a.safetensors").write_bytes(bytes(10_000))
    fetch_ahead(tmp_path)
