"""The smallest thing that can drive a ModelRunner: greedy decoding of a changing batch.

It exists to test the runner without the engine. What it does is deliberately awkward: prompts are
cut into chunks of odd lengths, sequences join while others decode, and blocks come in random order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.model_runner import ModelRunner
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup

RunStep = Callable[[StepPlan], Tensor | None]


@dataclass
class _Sequence:
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated


def greedy(
    run_step: RunStep,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
    num_blocks: int,
    block_size: int = 16,
    token_budget: int = 61,
    seed: int = 0,
) -> list[list[int]]:
    """The `num_new_tokens` most likely tokens after each prompt, `token_budget` rows a step."""
    rng = random.Random(seed)
    free = rng.sample(range(num_blocks), num_blocks)
    sequences = [_Sequence(list(prompt)) for prompt in prompts]
    while True:
        chunks = _schedule(sequences, num_new_tokens, token_budget)
        if not chunks:
            return [sequence.generated for sequence in sequences]
        for sequence, num_new in chunks:
            while len(sequence.blocks) * block_size < sequence.num_computed + num_new:
                sequence.blocks.append(free.pop())
        plan, sampled = _plan(chunks, block_size)
        logits = run_step(plan)
        assert logits is not None
        for row, sequence in enumerate(sampled):
            sequence.generated.append(int(logits[row].argmax()))


def greedy_as_rank(
    runner: ModelRunner,
    group: TensorParallelGroup,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
) -> list[list[int]] | None:
    """`greedy` over all ranks of `group`: rank 0 drives and returns the answers, others follow."""
    if group.rank != 0:
        while (plan := group.receive_plan()) is not None:
            assert runner.execute(plan) is None
        return None

    def run_step(plan: StepPlan) -> Tensor | None:
        group.send_plan(plan)
        return runner.execute(plan)

    answers = greedy(run_step, prompts, num_new_tokens=num_new_tokens, num_blocks=runner.num_blocks)
    group.send_plan(None)
    return answers


def _schedule(
    sequences: list[_Sequence], num_new_tokens: int, budget: int
) -> list[tuple[_Sequence, int]]:
    """Decodes first, then as much of the waiting prompts as fits."""
    unfinished = [s for s in sequences if len(s.generated) < num_new_tokens]
    unfinished.sort(key=lambda s: len(s.tokens) - s.num_computed)
    chunks = []
    for sequence in unfinished:
        num_new = min(len(sequence.tokens) - sequence.num_computed, budget)
        if num_new:
            chunks.append((sequence, num_new))
            budget -= num_new
    return chunks


def _plan(chunks: list[tuple[_Sequence, int]], block_size: int) -> tuple[StepPlan, list[_Sequence]]:
    token_ids, positions, slots, starts, lens, rows = [], [], [], [0], [], []
    sampled = []
    for sequence, num_new in chunks:
        window = range(sequence.num_computed, sequence.num_computed + num_new)
        token_ids += [sequence.tokens[position] for position in window]
        positions += list(window)
        slots += [
            sequence.blocks[position // block_size] * block_size + position % block_size
            for position in window
        ]
        starts.append(len(token_ids))
        lens.append(window.stop)
        if window.stop == len(sequence.tokens):
            rows.append(len(token_ids) - 1)
            sampled.append(sequence)
        sequence.num_computed = window.stop
    widest = max(len(sequence.blocks) for sequence, _ in chunks)
    tables = [s.blocks + [0] * (widest - len(s.blocks)) for s, _ in chunks]
    plan = StepPlan(
        token_ids=int32(token_ids),
        positions=int32(positions),
        slot_mapping=int32(slots),
        query_starts=int32(starts),
        context_lens=int32(lens),
        block_tables=int32(tables),
        logits_rows=int32(rows),
    )
    return plan, sampled


def int32(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """`values` as a step plan wants them."""
    return torch.tensor(values, dtype=torch.int32)
