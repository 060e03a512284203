"""A model's name by its contents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.content_digest import StoredBytes, content_digest
from gpu_worker.models.mapped_file import MappedFile

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_model_len=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)
SIZES = {"small": 100, "large": 1 << 20}


def stored(path: Path, values: dict[str, bytes], *, shift: int = 0) -> list[StoredBytes]:
    """Tensors one after another in a file, behind `shift` bytes of something else."""
    path.write_bytes(bytes(shift) + b"".join(values.values()))
    file, offset, tensors = MappedFile(path), shift, []
    for name, value in values.items():
        tensors.append(StoredBytes(name, "F32", (len(value) // 4,), file, offset, len(value)))
        offset += len(value)
    return tensors


def random_values(seed: int = 0) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    return {name: random.bytes(size) for name, size in SIZES.items()}


def test_a_model_keeps_its_name_wherever_and_in_whatever_order_it_is_stored(
    tmp_path: Path,
) -> None:
    one = content_digest(CONFIG, stored(tmp_path / "one", random_values()))
    moved = stored(tmp_path / "other", random_values(), shift=77)[::-1]
    assert content_digest(CONFIG, moved) == one


def test_what_is_served_of_a_model_does_not_change_its_name(tmp_path: Path) -> None:
    tensors = stored(tmp_path / "m", random_values())
    shorter = replace(CONFIG, max_model_len=8, eos_token_ids=(1, 2))
    assert content_digest(shorter, tensors) == content_digest(CONFIG, tensors)


def test_other_weights_names_types_or_figures_make_another_name(tmp_path: Path) -> None:
    tensors = stored(tmp_path / "m", random_values())
    trained_on = random_values() | {"large": random_values(1)["large"]}
    digests = {
        content_digest(CONFIG, tensors),
        content_digest(replace(CONFIG, rope_theta=1e6), tensors),
        content_digest(CONFIG, tensors[:1]),
        content_digest(CONFIG, [replace(tensors[0], kind="F16"), tensors[1]]),
        content_digest(CONFIG, [replace(tensors[0], name="other"), tensors[1]]),
        content_digest(CONFIG, [replace(tensors[0], shape=(5, 5)), tensors[1]]),
        content_digest(CONFIG, stored(tmp_path / "n", trained_on)),
    }
    assert len(digests) == 7


def test_a_change_of_one_byte_of_a_small_tensor_or_of_one_end_of_a_large_one_is_seen(
    tmp_path: Path,
) -> None:
    digests = set()
    for name, place in (("small", 50), ("large", 0), ("large", -1)):
        values = {key: bytearray(value) for key, value in random_values().items()}
        values[name][place] ^= 1
        changed = {key: bytes(value) for key, value in values.items()}
        digests.add(content_digest(CONFIG, stored(tmp_path / "m", changed)))
    assert len(digests) == 3
