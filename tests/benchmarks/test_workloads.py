"""The workloads: what a seed decides, exact lengths, and what is shared."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.workloads import (
    SUFFIX,
    TIMED,
    WARM_UP,
    Workload,
    generate,
    load_workloads,
    read_workload,
    write_workload,
)
from gpu_worker.models.card import load_model_card
from producer.batch import BatchRow, parse_row
from support.model_files import gguf_path
from wire.messages import ModelCard

SHARED = 1024


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return load_model_card(gguf_path(), name=None, block_size=16, max_model_len=None)


@pytest.fixture(scope="module")
def workloads(card: ModelCard) -> dict[str, Workload]:
    return generate(card, seed=7)


def test_a_seed_decides_every_token(card: ModelCard, workloads: dict[str, Workload]) -> None:
    assert generate(card, seed=7) == workloads
    other = generate(card, seed=8)
    for name in TIMED:
        assert other[name] != workloads[name]


def test_mixed_prompts_have_the_lengths_of_chats(workloads: dict[str, Workload]) -> None:
    rows = workloads["mixed"].rows
    lengths = [len(row.prompt) for row in rows]
    assert len(rows) == 128
    assert min(lengths) >= 16
    assert max(lengths) <= 512
    assert 85 <= statistics.median(lengths) <= 140
    outputs = [row.num_output_tokens for row in rows]
    assert min(outputs) >= 16
    assert max(outputs) <= 192
    assert 90 <= statistics.mean(outputs) <= 118


def test_groups_share_exactly_their_first_tokens(workloads: dict[str, Workload]) -> None:
    rows = workloads["shared_prefix"].rows
    groups = Counter(row.prompt[:SHARED] for row in rows)
    assert sorted(groups.values()) == [24, 24, 24, 24]
    assert len({row.prompt for row in rows}) == 96
    assert len({row.prompt[: SHARED // 2] for row in rows}) == 4
    assert all(SHARED + 32 <= len(row.prompt) <= SHARED + 64 for row in rows)
    assert {row.num_output_tokens for row in rows} == {32}
    assert any(one.prompt[:SHARED] != other.prompt[:SHARED] for one, other in pairwise(rows))


def test_long_prompts_differ_within_their_first_block(workloads: dict[str, Workload]) -> None:
    rows = workloads["prefill"].rows
    assert [len(row.prompt) for row in rows] == [900] * 32
    assert {row.num_output_tokens for row in rows} == {8}
    assert len({row.prompt[:16] for row in rows}) == 32


def test_prompts_are_chats_in_the_models_template(
    card: ModelCard, workloads: dict[str, Workload]
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
    for workload in workloads.values():
        text = tokenizer.decode(list(workload.rows[0].prompt), skip_special_tokens=False)
        assert text.startswith("<|im_start|>system\n")
        assert "<|im_end|>\n<|im_start|>user\n" in text
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_files_are_batch_rows_of_greedy_requests_of_exact_length(
    tmp_path: Path, workloads: dict[str, Workload]
) -> None:
    path = tmp_path / f"mixed{SUFFIX}"
    write_workload(workloads["mixed"], path)
    assert read_workload(path) == workloads["mixed"]
    row = json.loads(path.read_text().splitlines()[3])
    wanted = workloads["mixed"].rows[3]
    parsed = parse_row(json.dumps(row).encode(), row_number=4)
    assert isinstance(parsed, BatchRow)
    assert parsed.prompt.token_ids is not None
    assert tuple(parsed.prompt.token_ids) == wanted.prompt
    assert parsed.sampling.greedy
    assert parsed.sampling.ignore_eos
    assert parsed.sampling.max_tokens == parsed.sampling.min_tokens == wanted.num_output_tokens


def test_a_directory_of_files_replaces_the_seed(
    tmp_path: Path, workloads: dict[str, Workload]
) -> None:
    for name in (WARM_UP, *TIMED):
        write_workload(workloads[name], tmp_path / f"{name}{SUFFIX}")
    assert load_workloads(gguf_path(), 99, tmp_path) == workloads


def test_a_prompt_that_is_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixed.ids.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "body": {"prompt": "text", "max_tokens": 1}}))
    with pytest.raises(ValueError, match="not a list of token ids"):
        read_workload(path)
