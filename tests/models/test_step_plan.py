"""A step plan survives the trip to the other ranks as one tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.step_plan import StepPlan


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    num_tokens, num_blocks = sum(lengths), draw(st.integers(0, 3))
    starts = torch.tensor([0, *lengths]).cumsum(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**31 - 1, shape, dtype=torch.int32)

    return StepPlan(
        token_ids=integers(num_tokens),
        positions=integers(num_tokens),
        slot_mapping=integers(num_tokens),
        query_starts=starts.to(torch.int32),
        context_lens=integers(len(lengths)),
        block_tables=integers(len(lengths), num_blocks),
        logits_rows=integers(draw(st.integers(0, 3))),
        copies_out=integers(draw(st.integers(0, 2)), 2),
        wiped_blocks=integers(draw(st.integers(0, 2))),
        copies_in=integers(draw(st.integers(0, 2)), 2),
    )


@settings(max_examples=50, deadline=None)
@given(plans())
def test_unpack_undoes_pack(plan: StepPlan) -> None:
    packed = plan.pack()
    assert packed.dtype == torch.int32
    assert packed.ndim == 1
    unpacked = StepPlan.unpack(packed)
    for field in dataclasses.fields(StepPlan):
        torch.testing.assert_close(
            getattr(unpacked, field.name), getattr(plan, field.name), rtol=0, atol=0
        )


def test_a_truncated_plan_is_an_error() -> None:
    packed = torch.tensor([3, 1, 1, 1, 0, 0, 0, 7, 7], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="split"):
        StepPlan.unpack(packed)
