"""Greedy answers of the real model equal those of transformers in float32, token by token.

From the GGUF file and from a Hugging Face directory, on one rank and on two, over a batch whose
prompts are cut into chunks while others decode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from gpu_worker.model_runner import ModelRunner
from gpu_worker.tensor_parallel import TensorParallelGroup
from support.greedy_driver import greedy
from support.greedy_reference import assert_greedy
from support.rank_processes import loaded_ranks
from wire.messages import ModelCard

NUM_NEW_TOKENS = 64
NUM_BLOCKS = 400

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def model_path(request: pytest.FixtureRequest, gguf_path: Path, hf_model_dir: Path) -> Path:
    return gguf_path if request.param == "gguf" else hf_model_dir


class Checker:
    """Compares answers with the reference, each different one once."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._checked: set[tuple[int, ...]] = set()

    def check(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer) == NUM_NEW_TOKENS
            if (*prompt, *answer) not in self._checked:
                for tie in assert_greedy(self._reference, prompt, answer):
                    print(f"explained by a tie: {tie}")
                self._checked.add((*prompt, *answer))


@pytest.fixture(scope="module")
def checker(reference: Any) -> Checker:
    return Checker(reference)


def test_one_rank_answers_as_the_reference_does(
    model_path: Path, prompts: list[list[int]], checker: Checker
) -> None:
    runner = ModelRunner(model_path, group=TensorParallelGroup.single(), num_blocks=NUM_BLOCKS)
    answers = greedy(runner.execute, prompts, num_new_tokens=NUM_NEW_TOKENS, num_blocks=NUM_BLOCKS)
    checker.check(prompts, answers)


def test_two_ranks_answer_as_the_reference_does_and_listen_on_loopback_only(
    model_path: Path, prompts: list[list[int]], checker: Checker, tmp_path: Path
) -> None:
    with loaded_ranks(
        2,
        model_path,
        tmp_path,
        prompts,
        num_new_tokens=NUM_NEW_TOKENS,
        num_blocks=NUM_BLOCKS,
    ) as ranks:
        # The vocabulary's matrix is there twice: a table to look up, and packed to multiply by.
        assert max(ranks.num_sharded_bytes) <= 0.6 * 4 * (134_479_872 + 49_152 * 576)
        for process in ranks.processes:
            listening = [
                connection.laddr.ip
                for connection in psutil.Process(process.pid).net_connections()
                if connection.status == psutil.CONN_LISTEN
            ]
            assert set(listening) <= {"127.0.0.1"}, listening
        answers = ranks.go()
    checker.check(prompts, answers)


def test_the_real_model_makes_sense(
    gguf_path: Path, prompts: list[list[int]], card: ModelCard
) -> None:
    # The reference reads weights that our reader wrote; this catches an error that both share.
    runner = ModelRunner(gguf_path, group=TensorParallelGroup.single(), num_blocks=NUM_BLOCKS)
    [answer] = greedy(runner.execute, prompts[:1], num_new_tokens=8, num_blocks=NUM_BLOCKS)
    text = Tokenizer.from_buffer(card.tokenizer_json).decode(answer)
    assert text.startswith("The capital of France is Paris.")
