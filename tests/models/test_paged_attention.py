"""The fast CPU attention equals the plain reference on every mix of shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.page_formats import BFLOAT16, FLOAT16, FLOAT32, FP8, INT8, PageFormat
from cache.pages import KVPages, PageShape
from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.interface import HeadMap
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.step_plan import StepPlan
from support.random_pages import fill_pages, write_blocks, write_slots

CPU = torch.device("cpu")
HEAD_DIM = 8
HEAD_MAPS = (
    (0,),
    (0, 0, 0),
    (0, 1, 2),
    (0, 0, 0, 1, 1, 1),
    (0, 0, 0, 1, 1),  # uneven sharding: a key/value head that serves fewer query heads
    (0, 1, 1, 1),
)


def make_step(
    sequences: list[tuple[int, int]],
    block_size: int,
    seed: int,
    *,
    num_kv_heads: int = 3,
    form: PageFormat = FLOAT32,
) -> tuple[StepPlan, KVPages, int]:
    """A step over `sequences` of (new tokens, tokens before them), in scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks_of = [-(-(new + before) // block_size) for new, before in sequences]
    num_blocks = sum(num_blocks_of) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    widest = max(num_blocks_of)
    tables = [[free.pop() for _ in range(n)] + [0] * (widest - n) for n in num_blocks_of]
    positions = [p for new, before in sequences for p in range(before, before + new)]
    starts = torch.tensor([0] + [new for new, _ in sequences]).cumsum(0)
    plan = StepPlan(
        token_ids=torch.zeros(len(positions), dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.zeros(len(positions), dtype=torch.int32),
        query_starts=starts.to(torch.int32),
        context_lens=torch.tensor([sum(s) for s in sequences], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logits_rows=torch.zeros(0, dtype=torch.int32),
    )
    pages = KVPages(PageShape(1, num_kv_heads, HEAD_DIM, block_size, form), num_blocks, CPU)
    fill_pages(pages, generator)
    return plan, pages, len(positions)


def assert_same(
    sequences: list[tuple[int, int]], kv_head_of_query: tuple[int, ...], block_size: int, seed: int
) -> None:
    num_kv_heads = kv_head_of_query[-1] + 1
    plan, pages, num_tokens = make_step(sequences, block_size, seed, num_kv_heads=num_kv_heads)
    heads = HeadMap.build(kv_head_of_query, CPU)
    query = torch.randn(num_tokens, len(kv_head_of_query), HEAD_DIM)
    expected = ReferenceAttention(plan, pages)(query, pages.layer(0), heads, 0.3)
    found = CpuAttention(plan, pages)(query, pages.layer(0), heads, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6),
    kv_head_of_query=st.sampled_from(HEAD_MAPS),
    block_size=st.sampled_from((1, 4, 16)),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_on_any_mix_of_prefill_and_decode(
    sequences: list[tuple[int, int]],
    kv_head_of_query: tuple[int, ...],
    block_size: int,
    seed: int,
) -> None:
    assert_same(sequences, kv_head_of_query, block_size, seed)


@pytest.mark.parametrize("kv_head_of_query", HEAD_MAPS)
def test_equals_the_reference_on_many_decodes_of_very_different_lengths(
    kv_head_of_query: tuple[int, ...],
) -> None:
    # 128 contexts of 16 to 700 tokens fill several decode groups.
    sequences = [(1, 15 + 684 * i // 127) for i in range(128)]
    assert_same(sequences[::-1], kv_head_of_query, 16, 0)


def test_a_sequence_does_not_see_slots_beyond_its_context() -> None:
    plan, pages, num_tokens = make_step([(1, 4), (1, 29), (2, 4)], 16, 1)
    heads = HeadMap.build((0, 0, 0, 1, 1, 1, 2, 2, 2), CPU)
    query = torch.randn(num_tokens, 9, HEAD_DIM)
    before = CpuAttention(plan, pages)(query, pages.layer(0), heads, 1.0)
    for row, context_len in enumerate(plan.context_lens.tolist()):
        last_block = int(plan.block_tables[row, (context_len - 1) // 16])
        beyond = torch.arange(last_block * 16 + context_len % 16, (last_block + 1) * 16)
        write_slots(pages, beyond, 1e4)
    after = CpuAttention(plan, pages)(query, pages.layer(0), heads, 1.0)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("victim", range(4))
def test_a_sequence_whose_numbers_went_bad_spoils_no_other(victim: int) -> None:
    """Also where its first block is block 0, with which the shorter ones' tables are padded."""
    plan, pages, num_tokens = make_step([(1, 50), (1, 4), (1, 29), (3, 4)], 16, 1)
    first = int(plan.block_tables[victim, 0])
    swap = {0: first, first: 0}
    num_blocks_of = [-(-length // 16) for length in plan.context_lens.tolist()]
    for row, num_blocks in enumerate(num_blocks_of):
        for i in range(num_blocks):
            block = int(plan.block_tables[row, i])
            plan.block_tables[row, i] = swap.get(block, block)
    heads = HeadMap.build((0, 0, 0, 1, 1, 1, 2, 2, 2), CPU)
    query = torch.randn(num_tokens, 9, HEAD_DIM)
    before = CpuAttention(plan, pages)(query, pages.layer(0), heads, 1.0)
    own = plan.block_tables[victim, : num_blocks_of[victim]]
    write_blocks(pages, own.long(), torch.nan)
    after = CpuAttention(plan, pages)(query, pages.layer(0), heads, 1.0)
    starts = plan.query_starts.tolist()
    others = [r for r in range(num_tokens) if not starts[victim] <= r < starts[victim + 1]]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert after[starts[victim]].isnan().all()


@pytest.mark.parametrize("form", [FLOAT16, BFLOAT16, FP8, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_numbers_stay_near_the_reference(form: PageFormat, dtype: torch.dtype) -> None:
    sequences = [(1, 100), (1, 3), (7, 30), (5, 0)]
    plan, pages, num_tokens = make_step(sequences, 16, 2, form=form)
    heads = HeadMap.build((0, 0, 1, 2), CPU)
    query = torch.randn(num_tokens, 4, HEAD_DIM).to(dtype)
    expected = ReferenceAttention(plan, pages)(query, pages.layer(0), heads, 0.3)
    found = CpuAttention(plan, pages)(query, pages.layer(0), heads, 0.3)
    # Both round to the element type once or twice on the way.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
