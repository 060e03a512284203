"""The real model under everything at once that could change its output, against `transformers`.

Requests arrive while others generate, prompts are cut into chunks, all share a prefix, and the pool
is too small for them, so that sequences are preempted and resume: from host memory, or by computing
again what they had. Still every answer must be the
reference's greedy one in float32, token by token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from gpu_worker.engine.sharded import ShardedEngine
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.models.card import load_model_card
from gpu_worker.rank_group import open_ranks
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import AddRequests, EngineStats, StepOutput, StepProgress
from support.engine_fakes import assignment, rank_options, run_to_end, tokens_of
from support.greedy_reference import assert_greedy, load_reference
from support.model_files import gguf_path, hf_model_dir
from wire.messages import Assignment
from wire.sampling import SamplingParams

NUM_NEW_TOKENS = 64
HOST_CACHE_BYTES = 64 * 2**20
"""For the runs from the GGUF file, half of all."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face. Answer briefly."
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about a river in spring.",
    "What is 12 times 12? Show how you work it out.",
    "List three fruits that are yellow.",
    "Translate 'good morning' to German, French and Italian.",
    "def is_prime(n):\n    # finish this function\n",
    "Why is the sky blue?",
    "Repeat after me: " + "the quick brown fox jumps over the lazy dog, " * 8,
    "Name the planets of the solar system in order.",
    "What does a turbine do?",
    "¿Dónde está la biblioteca?",
    "Count from 20 down to 1.",
    "Who wrote Faust, and what is it about?",
    "Summarize: " + "A dam holds the water back until it is needed downstream. " * 6,
    "Explain recursion.",
    "ok",
]

OneRun = tuple[dict[str, list[int]], EngineStats]


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(hf_model_dir())


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    card = load_model_card(gguf_path(), name=None, block_size=16, max_model_len=None)
    tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
    texts = [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for question in QUESTIONS
    ]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return {f"request-{i}": encoding.ids for i, encoding in enumerate(encodings)}


def options_for(path: Path) -> RankOptions:
    # One thread a rank: more of them than idle cores would mostly wait for each other.
    return rank_options(
        model_path=str(path),
        block_size=16,
        num_blocks=72,
        max_num_seqs=12,
        max_num_batched_tokens=96,
        host_cache_bytes=HOST_CACHE_BYTES if path.is_file() else 0,
    )


def requests_for(prompts: dict[str, list[int]]) -> list[Assignment]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    return [assignment(request_id, prompt, sampling) for request_id, prompt in prompts.items()]


def run_in_process(path: Path, requests: list[Assignment], folder: Path) -> OneRun:
    with ShardedEngine(1, folder / "rendezvous", options_for(path), LayerCounter()) as engine:
        arrivals = {step: requests[step : step + 3] for step in range(0, len(requests), 3)}
        outputs = run_to_end(engine, arrivals)
        stats = engine.step().stats
    return {request_id: tokens_of(parts) for request_id, parts in outputs.items()}, stats


def run_on_two_ranks(path: Path, requests: list[Assignment], folder: Path) -> OneRun:
    return asyncio.run(run_ranks(path, requests))


async def run_ranks(path: Path, requests: list[Assignment]) -> OneRun:
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting = [requests[start : start + 3] for start in range(0, len(requests), 3)]
    names: dict[int, str] = {}
    num_unfinished = len(requests)
    stats = EngineStats()
    async with open_ranks(options_for(path), 2) as group:
        await group.wait_ready(60)
        await group.send(AddRequests(tuple(waiting.pop(0))))
        while num_unfinished:
            frame = await group.receive()
            if isinstance(frame, StepProgress):
                continue
            assert isinstance(frame, StepOutput)
            stats = frame.stats
            if waiting:
                await group.send(AddRequests(tuple(waiting.pop(0))))
            for output in frame.outputs:
                assert output.error is None
                if output.index is not None:
                    names[output.index] = output.request_id
                answers[output.request_id] += output.token_ids
                num_unfinished -= output.finish_reason is not None
            for index, token_id in zip(frame.indices, frame.token_ids, strict=True):
                answers[names[index]].append(token_id)
    return answers, stats


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("run", [run_in_process, run_on_two_ranks], ids=["tp1", "tp2"])
@pytest.mark.parametrize("find_model", [gguf_path, hf_model_dir], ids=["gguf", "safetensors"])
def test_answers_are_the_references_greedy_ones(
    find_model: Callable[[], Path],
    run: Callable[[Path, list[Assignment], Path], OneRun],
    prompts: dict[str, list[int]],
    reference: Any,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    answers, stats = run(find_model(), requests_for(prompts), tmp_path)
    assert stats.num_preemptions_total > 0, "the pool was meant to be too small"
    assert stats.num_cached_tokens_total > 0, "prefixes were meant to be reused"
    for request_id, prompt in prompts.items():
        assert len(answers[request_id]) == NUM_NEW_TOKENS
        # Where two logits tie, either token is right, and the rest follows from the one taken.
        for tie in assert_greedy(reference, prompt, answers[request_id]):
            record_property(f"tie in {request_id}", tie)
