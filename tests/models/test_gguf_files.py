"""GGUF files: slices of every quantization, and damaged files that end in one clear line."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.models.gguf_config import read_gguf_config
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_tensors import GGUFTensors
from gpu_worker.models.weights import open_model
from support.tiny_models import make_tiny_model, write_gguf
from wire.errors import ModelError

QUANTIZATIONS = [
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
]
NUM_ROWS, NUM_COLUMNS = 6, 512


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One matrix of each quantization, named after it."""
    path = tmp_path_factory.mktemp("gguf") / "matrices.gguf"
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for kind in QUANTIZATIONS:
        values = rng.normal(size=(NUM_ROWS, NUM_COLUMNS)).astype(np.float32)
        if kind.name.endswith("_K"):
            # There is no packer for these, but any bytes are a block whose scales are finite.
            num_bytes = {"Q4_K": 144, "Q6_K": 210}[kind.name] * NUM_COLUMNS // 256
            packed = rng.integers(0, 60, size=(NUM_ROWS, num_bytes), dtype=np.uint8)
        else:
            packed = quantize(values, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", QUANTIZATIONS, ids=lambda kind: kind.name)
def test_any_slice_is_that_slice_of_the_whole_dequantized_matrix(
    quantized_file: Path, kind: GGMLQuantizationType
) -> None:
    file = GGUFFile(quantized_file)
    tensors, tensor = GGUFTensors(file), file.tensors[kind.name]
    [stored] = [t for t in GGUFReader(quantized_file).tensors if t.name == kind.name]
    whole = dequantize(stored.data, kind)

    np.testing.assert_array_equal(tensors.read(tensor).astype(np.float32), whole)
    for columns in (range(512), range(1), range(31, 33), range(70, 333), range(500, 512)):
        found = tensors.read(tensor, range(2, 5), columns).astype(np.float32)
        np.testing.assert_array_equal(found, whole[2:5, columns.start : columns.stop])


def test_the_real_file_reads_as_the_gguf_package_reads_it(gguf_path: Path) -> None:
    file = GGUFFile(gguf_path)
    tensors = GGUFTensors(file)
    theirs = {tensor.name: tensor for tensor in GGUFReader(gguf_path).tensors}
    assert theirs.keys() == file.tensors.keys()
    for name in ("blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        expected = dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_array_equal(tensors.read(file.tensors[name]), expected)


def test_a_quantized_model_loads_its_rows_and_columns(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path, lambda name: GGMLQuantizationType.Q8_0)
    _, reader = open_model(path)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = reader.read(name, (96, 128))
    torch.testing.assert_close(whole, model.state_dict()[name], atol=0.01, rtol=0.01)
    part = reader.read(name, (96, 128), rows=range(3, 7), columns=range(43, 86))
    assert torch.equal(part, whole[3:7, 43:86])


def test_a_truncated_file_says_so(gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cut\.gguf is truncated: tensor .* download it again"):
        GGUFFile(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small model in one file."""
    directory = tmp_path_factory.mktemp("small")
    model = make_tiny_model("llama3", directory / "model")
    write_gguf(model, directory / "tiny.gguf", lambda name: GGMLQuantizationType.Q8_0)
    return (directory / "tiny.gguf").read_bytes()


def open_and_read_all(path: Path) -> None:
    file = GGUFFile(path)
    read_gguf_config(file)
    tensors = GGUFTensors(file)
    for tensor in file.tensors.values():
        tensors.read(tensor)


def test_cut_anywhere_it_is_a_model_error(small_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small_file)
    end = max(tensor.offset + tensor.size_bytes for tensor in GGUFFile(path).tensors.values())
    for length in [*range(0, 2000, 37), *range(2000, end, 9973), end - 1]:
        path.write_bytes(small_file[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_and_read_all(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 4000), value=st.binary(min_size=1, max_size=8))
def test_damaged_anywhere_it_loads_or_is_a_model_error(
    small_file: bytes, tmp_path: Path, position: int, value: bytes
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(small_file[:position] + value + small_file[position + len(value) :])
    # Any other exception than ModelError fails the test.
    with np.errstate(all="ignore"), suppress(ModelError):
        open_and_read_all(path)


def with_field(key: str, type_id: int, value: bytes) -> bytes:
    """A file of one metadata field and no tensors."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return header + struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", type_id) + value


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "truncated or damaged"),
        (with_field("a", 8, struct.pack("<Q", 2**63)), "truncated or damaged"),
        (with_field("a", 9, struct.pack("<IQ", 8, 2**62)), "truncated or damaged"),
        (with_field("a", 9, struct.pack("<IQ", 4, 2**62)), "truncated or damaged"),
        (with_field("a", 9, struct.pack("<IQ", 9, 1)), "arrays of metadata type 9"),
        (with_field("a", 77, b""), "unknown metadata type 77"),
        (with_field("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (with_field("general.architecture", 8, struct.pack("<Q", 5) + b"gemma"), "'gemma' is not"),
        (with_field("split.count", 2, struct.pack("<H", 2)), "merge the parts"),
        (with_field("general.name", 8, struct.pack("<Q", 1) + b"x"), "architecture is missing"),
    ],
)
def test_a_hostile_file_is_a_model_error(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        open_and_read_all(path)
    assert str(path) in str(caught.value)


def test_biases_that_the_architecture_does_not_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "biased.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"bias blk\.0\.attn_q\.bias is not supported for llama"):
        read_gguf_config(GGUFFile(path))


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.gguf does not exist"):
        open_model(tmp_path / "no.gguf")
