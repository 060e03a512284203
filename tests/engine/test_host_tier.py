"""Evicted blocks in host memory, under a real engine: every answer stays what it would be."""

from __future__ import annotations

import random

import pytest
import torch

from cache.host_pages import HostPages
from cache.page_formats import FLOAT32, FP8, PageFormat
from cache.pages import KVPages, PageShape
from gpu_worker.rank_protocol import StepOutput
from gpu_worker.step_plan import StepPlan
from support.engine_fakes import (
    assignment,
    greedy_continuation,
    hashing_engine,
    run_to_end,
    tokens_of,
)
from support.scheduler_fakes import scheduler, sequence, step
from wire.ids import RequestId
from wire.messages import Assignment
from wire.sampling import SamplingParams

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


def test_a_preempted_sequence_goes_on_with_its_full_blocks() -> None:
    one = scheduler(num_blocks=5, num_slots=4)
    one.add(sequence("old", 8))
    one.add(sequence("young", 8, first_token=50))
    step(one)
    assert step(one) == {"old": 1}
    assert one.num_preemptions == 1
    old = one.running[0]
    while len(old.block_table) < 5:  # the pool is all its own
        step(one)
    one.remove(old)
    young = one.waiting[0]
    found = one.cache.find_prefix(young.block_hashes)
    assert (len(found.block_ids), len(found.slots)) == (0, 2)
    assert list(one.schedule().values()) == [1], "only what it had not computed yet"
    _, copies_in = one.cache.take_copies()
    assert [copy.block_id for copy in copies_in] == list(young.block_table[:2])


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


@pytest.mark.parametrize("num_host_blocks", [7, 100])
def test_answers_are_the_same_whatever_becomes_of_preempted_sequences(num_host_blocks: int) -> None:
    requests = random_requests(12)
    answers, num_computed = [], []
    for num_blocks, num_slots in ((18, num_host_blocks), (18, 0), (512, 0)):
        engine, runner = hashing_engine(num_blocks=num_blocks, num_host_blocks=num_slots)
        outputs = run_to_end(engine, {0: requests[:6], 3: requests[6:]})
        answers.append({name: tokens_of(parts) for name, parts in outputs.items()})
        num_computed.append(runner.num_computed_tokens)
        assert (engine.step().stats.num_preemptions_total > 0) == (num_blocks == 18)
    assert answers[0] == answers[1] == answers[2]
    assert num_computed[0] < num_computed[1], "what was copied need not be computed again"


def test_a_prefix_that_left_the_device_is_not_computed_again() -> None:
    engine, runner = hashing_engine(num_blocks=6, num_host_blocks=8)
    prompts = [list(range(first, first + 21)) for first in (0, 30, 60)]
    for i, prompt in enumerate(prompts):
        run_to_end(engine, {0: [assignment(str(i), prompt, ONE_TOKEN)]})
    num_computed = runner.num_computed_tokens
    (again,) = run_to_end(engine, {0: [assignment("again", prompts[1], ONE_TOKEN)]})["again"]
    assert again.num_cached_tokens == 20
    assert runner.num_computed_tokens == num_computed + 1
    assert tokens_of([again]) == greedy_continuation(prompts[1], 1)


def test_a_block_that_comes_back_into_a_wiped_one_is_whole() -> None:
    engine, runner = hashing_engine(num_blocks=6, num_host_blocks=8)
    prompt = list(range(21))
    run_to_end(engine, {0: [assignment("first", prompt, ONE_TOKEN)]})
    engine.add(assignment("bad", range(30, 50)))
    engine.step()
    engine._fail(engine._sequences[RequestId("bad")])
    wiped = set(engine._to_wipe)
    assert wiped
    plans: list[StepPlan] = []
    execute = runner.execute

    def recorded(plan: StepPlan) -> torch.Tensor:
        plans.append(plan)
        return execute(plan)

    runner.execute = recorded  # type: ignore[method-assign]
    (again,) = run_to_end(engine, {0: [assignment("again", prompt, ONE_TOKEN)]})["again"]
    assert tokens_of([again]) == greedy_continuation(prompt, 1)
    copied = set(plans[0].copies_in[:, 0].tolist())
    assert copied & wiped
    assert set(plans[0].wiped_blocks.tolist()) == wiped - copied


# What the engine says of its cache


def hashes_in(packed: bytes) -> set[bytes]:
    return {packed[start : start + 16] for start in range(0, len(packed), 16)}


def test_every_step_says_what_has_moved() -> None:
    engine, _ = hashing_engine(num_blocks=3, num_host_blocks=2)
    tiers: dict[bytes, str] = {}

    def take_in(output: StepOutput) -> None:
        changes = output.cache_changes
        for tier in ("device", "host", "gone"):
            tiers.update(dict.fromkeys(hashes_in(getattr(changes, tier)), tier))

    for i, first in enumerate((0, 30, 60)):
        engine.add(assignment(str(i), range(first, first + 9), ONE_TOKEN))
        while engine.has_work:
            take_in(engine.step())
    device, host = engine.cache.device.names(), engine.cache.host.names()
    assert {h for h, tier in tiers.items() if tier == "device"} == device
    assert {h for h, tier in tiers.items() if tier == "host"} == host
    assert sorted(tiers.values()).count("gone") == 2
    assert not engine.step().cache_changes


@pytest.mark.parametrize("form", [FLOAT32, FP8], ids=lambda form: form.name)
def test_blocks_survive_the_way_to_host_memory_and_back(form: PageFormat) -> None:
    shape = PageShape(num_layers=2, num_kv_heads=3, head_dim=4, block_size=5, format=form)
    pages = KVPages(shape, 4, torch.device("cpu"))
    pages.data.random_(256)
    before = pages.data.clone()
    host = HostPages(pages, 3)
    host.copy_out(torch.tensor([[1, 2], [3, 0]], dtype=torch.int32))
    pages.data.zero_()
    host.copy_in(torch.tensor([[0, 2], [2, 0]], dtype=torch.int32))
    assert torch.equal(pages.data[0], before[1])
    assert torch.equal(pages.data[2], before[3])
    assert not pages.data[1].any()
