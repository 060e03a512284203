"""Driving a model runner without an engine: given tokens in, logits or greedy tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.model_runner import ModelRunner
from gpu_worker.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a sequence: tokens `start` and on, in the pages from `first_block` on."""

    token_ids: Sequence[int]
    start: int
    first_block: int


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def plan_step(chunks: Sequence[Chunk], block_size: int, *, every_row: bool) -> StepPlan:
    """A step over `chunks`, with logits for every token or for the last one of each chunk.

    A sequence's blocks follow one another, so a block table is a range.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lens = [0], []
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        token_ids += chunk.token_ids
        positions += range(chunk.start, end)
        first_slot = chunk.first_block * block_size
        slots += range(first_slot + chunk.start, first_slot + end)
        starts.append(len(token_ids))
        lens.append(end)
    widest = blocks_for(max(lens), block_size)
    tables = [
        [*range(chunk.first_block, chunk.first_block + blocks_for(length, block_size))]
        for chunk, length in zip(chunks, lens, strict=True)
    ]
    rows = list(range(len(token_ids))) if every_row else [start - 1 for start in starts[1:]]
    return StepPlan(
        token_ids=_int32(token_ids),
        positions=_int32(positions),
        slot_mapping=_int32(slots),
        query_starts=_int32(starts),
        context_lens=_int32(lens),
        block_tables=_int32([table + [0] * (widest - len(table)) for table in tables]),
        logits_rows=_int32(rows),
    )


def text_logits(runner: ModelRunner, token_ids: Sequence[int], chunk_len: int) -> Iterator[Tensor]:
    """Logits at every position of one sequence, (up to `chunk_len`, vocabulary) at a time."""
    for start in range(0, len(token_ids), chunk_len):
        chunk = Chunk(token_ids[start : start + chunk_len], start, first_block=0)
        yield _run(runner, plan_step([chunk], runner.block_size, every_row=True))


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt's greedy continuation, and the logits (vocabulary,) of its first token."""

    token_ids: list[int]
    first_logits: Tensor


def continue_greedily(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[Continuation]:
    """The `num_tokens` most likely tokens after each prompt, whatever they are.

    All prompts are held at once, each in blocks for as many tokens as the longest will have.
    """
    longest = max(map(len, prompts)) + num_tokens
    stride = blocks_for(longest, runner.block_size)
    assert stride * len(prompts) <= runner.num_blocks
    answers = []
    for index, prompt in enumerate(prompts):
        chunk = Chunk(prompt, 0, first_block=index * stride)
        logits = _run(runner, plan_step([chunk], runner.block_size, every_row=False))[0]
        answers.append(Continuation([int(logits.argmax())], logits))
    for _ in range(num_tokens - 1):
        chunks = [
            Chunk(answer.token_ids[-1:], len(prompt) + len(answer.token_ids) - 1, index * stride)
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        logits = _run(runner, plan_step(chunks, runner.block_size, every_row=False))
        for answer, token_id in zip(answers, logits.argmax(1).tolist(), strict=True):
            answer.token_ids.append(token_id)
    return answers


def _run(runner: ModelRunner, plan: StepPlan) -> Tensor:
    logits = runner.execute(plan)
    assert logits is not None
    return logits


def _int32(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
