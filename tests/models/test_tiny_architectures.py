"""Every supported architecture equals transformers: random weights, all forms, all group sizes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from gpu_worker.kernels import library
from gpu_worker.model_runner import ModelRunner
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup
from service.settings import Quantization
from support.greedy_driver import greedy_as_rank, int32
from support.greedy_reference import assert_greedy, reference_logits
from support.rank_processes import loaded_ranks
from support.thread_group import run_as_ranks
from support.tiny_models import SPECS, VOCAB_SIZE, make_tiny_model, write_gguf

NUM_BLOCKS = 64
NUM_NEW_TOKENS = 24
PROMPTS = [
    [random.Random(i).randrange(VOCAB_SIZE) for _ in range(length)]
    for i, length in enumerate((1, 5, 16, 33, 70, 100))
]


@dataclass(frozen=True)
class TinyModel:
    spec: str
    directory: Path
    reference: Any


@pytest.fixture(scope="module", params=SPECS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp(request.param)
    reference = make_tiny_model(request.param, directory)
    return TinyModel(request.param, directory, reference)


def whole_prompt(tokens: list[int]) -> StepPlan:
    """One step that computes all of `tokens` and wants every row's logits."""
    every_row = int32(range(len(tokens)))
    return StepPlan(
        token_ids=int32(tokens),
        positions=every_row,
        slot_mapping=every_row,
        query_starts=int32([0, len(tokens)]),
        context_lens=int32([len(tokens)]),
        block_tables=int32([range(-(-len(tokens) // 16))]),
        logits_rows=every_row,
    )


def run_greedy(model_path: Path, size: int) -> list[list[int]]:
    def work(group: TensorParallelGroup) -> list[list[int]] | None:
        runner = ModelRunner(model_path, group=group, num_blocks=NUM_BLOCKS)
        return greedy_as_rank(runner, group, PROMPTS, num_new_tokens=NUM_NEW_TOKENS)

    answers = run_as_ranks(size, work)[0]
    assert answers is not None
    return answers


def assert_all_greedy(reference: Any, answers: list[list[int]]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == NUM_NEW_TOKENS
        for tie in assert_greedy(reference, prompt, answer):
            print(f"explained by a tie: {tie}")


def test_the_fixture_saves_several_shards(tiny: TinyModel) -> None:
    index = json.loads((tiny.directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


@pytest.fixture(params=["kernels", "torch"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our kernels, where they are there, and torch's operations in their place."""
    if request.param == "torch":
        without_kernels(monkeypatch)
    return str(request.param)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "isa", lambda: None)


def test_every_logit_equals_the_reference(tiny: TinyModel, operations: str) -> None:
    runner = ModelRunner(tiny.directory, group=TensorParallelGroup.single(), num_blocks=NUM_BLOCKS)
    # 100 tokens are well beyond the 64 from which the scaled rotaries stretch.
    found = runner.execute(whole_prompt(PROMPTS[-1]))
    expected = reference_logits(tiny.reference, PROMPTS[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_greedy_answers_equal_the_reference_at_every_size(tiny: TinyModel, size: int) -> None:
    # 6 query and 2 key/value heads: even, uneven, and more ranks than key/value heads.
    assert_all_greedy(tiny.reference, run_greedy(tiny.directory, size))


def test_greedy_answers_without_kernels_equal_the_reference(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch)
    assert_all_greedy(tiny.reference, run_greedy(tiny.directory, 2))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_narrow_weights_mean_the_same_with_and_without_kernels(
    tiny: TinyModel, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits() -> torch.Tensor:
        runner = ModelRunner(
            tiny.directory,
            group=TensorParallelGroup.single(),
            quantization=quantization,
            num_blocks=NUM_BLOCKS,
        )
        found = runner.execute(whole_prompt(PROMPTS[-1]))
        assert found is not None
        return found.clone()

    on_kernels = logits()
    without_kernels(monkeypatch)
    # With kernels the activations are rounded as well.
    assert torch.nn.functional.cosine_similarity(on_kernels, logits()).min() > 0.99


@pytest.mark.parametrize("size", [1, 2])
def test_gguf_files_of_the_same_weights_answer_the_same(
    tiny: TinyModel, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny.reference, path, lambda name: GGMLQuantizationType.F32)
    assert_all_greedy(tiny.reference, run_greedy(path, size))


def test_ranks_that_are_processes_answer_the_same(tmp_path: Path) -> None:
    reference = make_tiny_model("qwen2", tmp_path / "model")
    with loaded_ranks(
        3,
        tmp_path / "model",
        tmp_path,
        PROMPTS,
        num_new_tokens=NUM_NEW_TOKENS,
        num_blocks=NUM_BLOCKS,
    ) as ranks:
        assert_all_greedy(reference, ranks.go())
