"""Preempted sequences' blocks in host memory: when it pays, and that nothing is lost there."""

from __future__ import annotations

import random

import pytest
import torch

from cache.host_pages import HostPages
from cache.pages import KVPages, PageShape
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.host_tier import HostTier
from support.engine_fakes import (
    HashingRunner,
    assignment,
    greedy_continuation,
    hashing_engine,
    rank_options,
    run_to_end,
    tokens_of,
)
from support.scheduler_fakes import eager_host, scheduler, sequence, step
from wire.ids import RequestId
from wire.messages import Assignment
from wire.sampling import SamplingParams


def measured(num_slots: int, *, copy_s: float, compute_s: float) -> HostTier:
    host = HostTier(num_slots, copy_s)
    host.observe(num_tokens=100, num_seqs=1, step_s=100 * compute_s)
    return host


def test_the_cheaper_of_copying_there_and_back_and_computing_again_is_taken() -> None:
    assert measured(9, copy_s=1.0, compute_s=1.0).take(4, num_tokens=9) is not None
    assert measured(9, copy_s=1.0, compute_s=1.0).take(4, num_tokens=8) is None
    assert measured(9, copy_s=10.0, compute_s=1.0).take(4, num_tokens=64) is None


def test_nothing_is_copied_before_a_prompt_was_timed_nor_without_room_nor_need() -> None:
    host = HostTier(3, 1e-9)
    assert host.take(1, 16) is None
    host.observe(num_tokens=64, num_seqs=64, step_s=1.0)  # a decode step
    assert host.take(1, 16) is None
    host.observe(num_tokens=128, num_seqs=64, step_s=1.0)
    assert host.take(4, 64) is None
    assert host.take(0, 0) is None
    slots = host.take(3, 48)
    assert slots is not None
    assert sorted(slots) == [0, 1, 2]
    host.give_back(slots)
    assert host.num_free == 3


def test_the_measured_cost_follows_the_recent_steps() -> None:
    host = measured(9, copy_s=1.0, compute_s=100.0)
    for _ in range(40):
        host.observe(num_tokens=100, num_seqs=1, step_s=1.0)
    assert host.take(1, num_tokens=16) is None


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    one = scheduler(num_blocks=5, host=eager_host(num_slots=4), caching=False)
    one.add(sequence("old", 8))
    one.add(sequence("young", 8, first_token=50))
    step(one)
    young = one.running[1]
    assert step(one) == {"old": 1}
    assert one.num_preemptions == 1
    assert young.saved is not None
    one.remove(one.running[0])
    schedule = one.schedule()
    assert list(schedule.values()) == [1], "only what it had not computed yet"
    assert [copy.block_id for copy in one.copies_in] == list(young.block_table[:2])


def test_what_others_hold_is_not_copied() -> None:
    one = scheduler(num_blocks=6, host=eager_host(num_slots=4))
    one.add(sequence("old", 12))
    step(one)
    one.add(sequence("young", 10))
    step(one)
    young = one.running[1]
    one._preempt_youngest()
    assert young.saved is not None
    assert (young.saved.first, len(young.saved.slots)) == (2, 1)


def random_requests(count: int) -> list[Assignment]:
    choose = random.Random(3)
    stems = [[choose.randrange(97) for _ in range(20)] for _ in range(2)]
    return [
        assignment(
            str(i),
            choose.choice(stems)[: choose.randrange(20)]
            + [choose.randrange(97) for _ in range(choose.randrange(1, 20))],
            SamplingParams(seed=i, max_tokens=20, temperature=choose.choice([0.0, 0.9])),
        )
        for i in range(count)
    ]


def eager_engine(
    *, num_blocks: int, num_host_blocks: int, prefix_caching: bool = True
) -> tuple[Engine, HashingRunner]:
    engine, runner = hashing_engine(
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        options=rank_options(prefix_caching=prefix_caching),
    )
    return engine, runner


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_host_blocks", [7, 100])
def test_answers_are_the_same_whatever_becomes_of_preempted_sequences(
    num_host_blocks: int, prefix_caching: bool
) -> None:
    requests = random_requests(12)
    answers, num_computed = [], []
    for num_blocks, num_slots in ((18, num_host_blocks), (18, 0), (512, 0)):
        engine, runner = eager_engine(
            num_blocks=num_blocks, num_host_blocks=num_slots, prefix_caching=prefix_caching
        )
        outputs = run_to_end(engine, {0: requests[:6], 3: requests[6:]})
        answers.append({name: tokens_of(parts) for name, parts in outputs.items()})
        num_computed.append(runner.num_computed_tokens)
        assert (engine.step().stats.num_preemptions_total > 0) == (num_blocks == 18)
        assert engine._host.num_free == num_slots
    assert answers[0] == answers[1] == answers[2]
    assert num_computed[0] < num_computed[1], "what was copied need not be computed again"


def test_an_abort_frees_what_a_sequence_has_in_host_memory() -> None:
    engine, _ = eager_engine(num_blocks=5, num_host_blocks=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=10)
    engine.add(assignment("old", range(8), sampling))
    engine.add(assignment("young", range(20, 28), sampling))
    while engine._host.num_free == 8:
        engine.step()
    engine.abort(RequestId("young"))
    assert engine._host.num_free == 8
    outputs = run_to_end(engine, {0: []})
    assert set(outputs) == {"old"}
    prompt = list(range(8))
    assert tokens_of(outputs["old"]) == greedy_continuation(prompt, 10)[-len(outputs["old"]) :]


def test_a_block_that_comes_back_into_a_wiped_one_is_whole() -> None:
    engine, _ = eager_engine(num_blocks=5, num_host_blocks=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=10)
    engine.add(assignment("old", range(8), sampling))
    engine.add(assignment("young", range(20, 28), sampling))
    while engine._host.num_free == 8:
        engine.step()
    engine._fail(engine._sequences[RequestId("old")])
    assert engine._to_wipe
    outputs = run_to_end(engine, {0: []})
    prompt = list(range(20, 28))
    answer = tokens_of(outputs["young"])
    assert answer == greedy_continuation(prompt, 10)[-len(answer) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_survive_the_way_to_host_memory_and_back(dtype: torch.dtype) -> None:
    shape = PageShape(num_layers=2, num_kv_heads=3, head_dim=4, block_size=5, dtype=dtype)
    pages = KVPages(shape, 4, torch.device("cpu"))
    pages.data.copy_(torch.randn(pages.data.shape))
    before = pages.data.clone()
    host = HostPages(pages, 3)
    assert host.measure_copy_s() > 0
    assert torch.equal(pages.data, before)
    host.copy_out(torch.tensor([[1, 2], [3, 0]], dtype=torch.int32))
    pages.data.zero_()
    host.copy_in(torch.tensor([[0, 2], [2, 0]], dtype=torch.int32))
    assert torch.equal(pages.data[0], before[1])
    assert torch.equal(pages.data[2], before[3])
    assert not pages.data[1].any()


def test_without_host_memory_there_is_nothing_to_copy_to() -> None:
    shape = PageShape(num_layers=1, num_kv_heads=1, head_dim=2, block_size=4, dtype=torch.float32)
    host = HostPages(KVPages(shape, 2, torch.device("cpu")), 0)
    assert (host.num_slots, host.measure_copy_s()) == (0, 0.0)
