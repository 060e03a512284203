"""Steps of attention over random pages, for comparing implementations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.page_formats import FLOAT32, PageFormat
from cache.pages import KVPages, PageShape
from gpu_worker.attention.interface import HeadMap
from gpu_worker.step_plan import StepPlan
from support.random_pages import fill_pages

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A plan, the pages that it reads (of which a layer is used), queries and heads."""

    plan: StepPlan
    pages: KVPages
    query: Tensor
    heads: HeadMap

    @property
    def scale(self) -> float:
        """As models have it."""
        return 1 / math.sqrt(self.query.shape[-1])

    def rows_of(self, seq: int) -> slice:
        """The rows of one sequence."""
        starts = self.plan.query_starts.tolist()
        return slice(starts[seq], starts[seq + 1])

    def blocks_of(self, seq: int) -> Tensor:
        """The blocks that one sequence fills."""
        num_blocks = -(-int(self.plan.context_lens[seq]) // self.pages.shape.block_size)
        return self.plan.block_tables[seq, :num_blocks].long()


def make_case(
    sequences: Sequence[tuple[int, int]],
    *,
    kv_head_of_query: tuple[int, ...] = (0, 0, 0, 1, 1, 1, 2, 2, 2),
    head_dim: int = 64,
    block_size: int = 16,
    form: PageFormat = FLOAT32,
    num_shared: int = 0,
    seed: int = 0,
) -> AttentionCase:
    """A step over `sequences` of (new tokens, tokens before them), in scattered blocks.

    The first `num_shared` tokens (in whole blocks) of all sequences lie in the same blocks, so
    far as they come before the new ones.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks_of = [-(-(new + before) // block_size) for new, before in sequences]
    free = torch.randperm(sum(num_blocks_of) + 2, generator=generator).tolist()
    num_blocks = len(free)
    tables = [[free.pop() for _ in range(n)] for n in num_blocks_of]
    longest = max(tables, key=len)
    for table, (_, before) in zip(tables, sequences, strict=True):
        num_same = min(num_shared, before) // block_size
        table[:num_same] = longest[:num_same]
    widest = max(num_blocks_of)
    positions = [p for new, before in sequences for p in range(before, before + new)]
    shape = PageShape(2, kv_head_of_query[-1] + 1, head_dim, block_size, form)
    pages = KVPages(shape, num_blocks, CPU)
    fill_pages(pages, generator)
    return AttentionCase(
        plan=StepPlan(
            token_ids=torch.zeros(len(positions), dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.zeros(len(positions), dtype=torch.int32),
            query_starts=torch.tensor([0] + [new for new, _ in sequences]).cumsum(0).int(),
            context_lens=torch.tensor([sum(s) for s in sequences], dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in tables]).int(),
            logits_rows=torch.zeros(0, dtype=torch.int32),
        ),
        pages=pages,
        query=torch.randn(len(positions), len(kv_head_of_query), head_dim, generator=generator),
        heads=HeadMap.build(kv_head_of_query, CPU),
    )
