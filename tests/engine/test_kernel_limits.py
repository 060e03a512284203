"""A model that our kernels cannot compute runs on torch's operations, and the log says why."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.engine.sharded import ShardedEngine
from gpu_worker.kernels import library
from gpu_worker.layer_progress import LayerCounter
from support.engine_fakes import assignment, rank_options, run_to_end, tokens_of
from support.greedy_reference import assert_greedy
from support.tiny_models import VOCAB_SIZE, make_tiny_model
from wire.sampling import SamplingParams

WIDEST = 256
NUM_NEW_TOKENS = 12
PROMPTS = {
    f"request-{length}": [random.Random(length).randrange(VOCAB_SIZE) for _ in range(length)]
    for length in (1, 17, 40)
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_engine(path: Path, dtype: str) -> tuple[dict[str, list[int]], list[str], str]:
    """Greedy answers, the reasons that the log has against our kernels, and what computed."""
    options = rank_options(
        model_path=str(path), block_size=16, num_blocks=32, max_num_batched_tokens=24
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    requests = [assignment(name, prompt, sampling) for name, prompt in PROMPTS.items()]
    with (
        capture_logs() as logs,
        ShardedEngine(
            1, path / "rendezvous", replace(options, dtype=dtype), LayerCounter()
        ) as engine,
    ):
        outputs = run_to_end(engine, {0: requests[:2], 3: requests[2:]})
    reasons = [entry["reason"] for entry in logs if entry["event"] == "cpu_kernels_unfit"]
    [chosen] = [entry["operations"] for entry in logs if entry["event"] == "operations_chosen"]
    return {name: tokens_of(parts) for name, parts in outputs.items()}, reasons, chosen


def test_heads_that_are_too_wide_for_the_kernels_are_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of this family, as its heads are normalized: the room for that is what bounds them.
    reference = make_tiny_model("qwen3", tmp_path, head_dim=WIDEST + 2)
    answers, reasons, chosen = run_engine(tmp_path, "auto")
    assert chosen == "torch"
    if library.isa() is not None:
        assert reasons == ["heads have 258 elements; the kernels take up to 256"]
    for name, prompt in PROMPTS.items():
        assert_greedy(reference, prompt, answers[name])

    monkeypatch.setattr(library, "isa", lambda: None)
    without_kernels, reasons, chosen = run_engine(tmp_path, "auto")
    assert answers == without_kernels
    assert (reasons, chosen) == ([], "torch")


@pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")
def test_the_widest_heads_that_the_kernels_take_are_computed_by_them(tmp_path: Path) -> None:
    reference = make_tiny_model("qwen3", tmp_path, head_dim=WIDEST)
    answers, reasons, chosen = run_engine(tmp_path, "float32")
    assert (reasons, chosen) == ([], "native")
    for name, prompt in PROMPTS.items():
        assert_greedy(reference, prompt, answers[name])
