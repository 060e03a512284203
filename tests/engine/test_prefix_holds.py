"""A prefix is computed once, also when all its readers come together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpu_worker.engine.iteration_scheduler import IterationScheduler
from gpu_worker.engine.sequence import Sequence
from support.engine_fakes import (
    assignment,
    greedy_continuation,
    hashing_engine,
    rank_options,
    run_to_end,
    tokens_of,
)
from support.scheduler_fakes import BLOCK_SIZE, scheduler, sequence_of, step
from wire.ids import RequestId
from wire.sampling import SamplingParams

SHARED = list(range(60, 84))


def readers(count: int, *, budget: int = 10, num_blocks: int = 100) -> IterationScheduler:
    """Sequences r0, r1, ... with the prefix SHARED and three tokens of their own."""
    one = scheduler(budget=budget, num_blocks=num_blocks)
    for i in range(count):
        one.add(sequence_of(f"r{i}", [*SHARED, i, i, i]))
    return one


def running(of: IterationScheduler, name: str) -> Sequence:
    (found,) = [seq for seq in of.running if seq.request_id == name]
    return found


def run_out(of: IterationScheduler, num_steps: int = 40) -> dict[str, int]:
    """Step on; the tokens that each sequence's prompt took to compute."""
    computed: dict[str, int] = {}
    for _ in range(num_steps):
        for name, num_tokens in step(of).items():
            computed[name] = computed.get(name, 0) + (num_tokens if num_tokens > 1 else 0)
    assert not of.waiting
    return computed


def test_readers_wait_until_the_first_of_them_has_computed_the_prefix() -> None:
    one = readers(4)
    steps = [step(one) for _ in range(4)]
    assert steps[:2] == [{"r0": 10}, {"r0": 10}]
    assert steps[2] == {"r0": 7}, "the last shared block is computed in this step"
    assert steps[3] == {"r0": 1, "r1": 3, "r2": 3, "r3": 3}


def test_those_behind_a_held_one_are_not_held_up() -> None:
    one = readers(2, budget=40)
    one.add(sequence_of("other", [1, 2, 3]))
    assert step(one) == {"r0": 27, "other": 3}
    assert list(step(one)) == ["r0", "other", "r1"]
    assert [seq.request_id for seq in one.running] == ["r0", "r1", "other"], "in order of arrival"


def test_a_reader_goes_on_as_soon_as_what_it_shares_is_there() -> None:
    one = scheduler(budget=8)
    one.add(sequence_of("long", range(80)))
    one.add(sequence_of("reader", [*range(8), 99]))
    assert step(one) == {"long": 8}
    assert len(one.waiting) == 1
    one.add(sequence_of("later", [1, 2]))
    running(one, "long").num_computed = 79  # generates from here on
    assert step(one) == {"long": 1, "reader": 1, "later": 2}


def test_each_shared_length_waits_for_its_own_computer() -> None:
    one = scheduler(budget=100)
    for name, num_shared in (("whole", 16), ("half", 8), ("half-too", 8)):
        tail = {"whole": 0, "half": 50, "half-too": 50}[name]
        own = [] if name == "whole" else [tail] * 8 + [ord(name[-1])]
        one.add(sequence_of(name, [*range(num_shared), *own]))
    assert step(one) == {"whole": 16}
    # Both share 8 tokens with the first, and 8 more with each other.
    assert step(one) == {"whole": 1, "half": 9}
    assert step(one) == {"whole": 1, "half": 1, "half-too": 1}


def end_by_abort(of: IterationScheduler) -> None:
    of.remove(running(of, "r0"))


def end_by_failure(of: IterationScheduler) -> None:
    of.discard(running(of, "r0"))


def end_by_preemption(of: IterationScheduler) -> None:
    of._preempt_youngest()
    of.remove(of.waiting[0])


@pytest.mark.parametrize("end", [end_by_abort, end_by_failure, end_by_preemption])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_when_the_first_gives_up_the_next_one_takes_over(
    end: Callable[[IterationScheduler], None], num_steps: int
) -> None:
    one = readers(4)
    for _ in range(num_steps):
        step(one)
    end(one)
    # What was computed stays usable, except after a failure.
    num_cached = 0 if end is end_by_failure else num_steps * 10 // BLOCK_SIZE * BLOCK_SIZE
    assert run_out(one) == {"r1": len(SHARED) + 3 - num_cached, "r2": 3, "r3": 3}


def test_a_preempted_first_keeps_its_turn() -> None:
    one = readers(3)
    step(one)
    one._preempt_youngest()
    assert [seq.request_id for seq in one.waiting] == ["r0", "r1", "r2"]
    assert step(one) == {"r0": 10}
    assert len(one.waiting) == 2


def test_a_reader_that_is_aborted_is_not_missed() -> None:
    one = readers(4, budget=40)
    step(one)
    one.remove(one.waiting[1])
    assert run_out(one) == {"r0": 0, "r1": 3, "r3": 3}


def test_without_prefix_caching_nobody_waits_for_a_prefix() -> None:
    one = scheduler(budget=100, caching=False)
    for i in range(3):
        one.add(sequence_of(f"r{i}", [*SHARED, i]))
    assert step(one) == {"r0": 25, "r1": 25, "r2": 25}


@pytest.mark.parametrize("max_num_batched_tokens", [24, 256])
@pytest.mark.parametrize("num_blocks", [30, 400])
def test_interleaved_groups_compute_each_prefix_once(
    max_num_batched_tokens: int, num_blocks: int
) -> None:
    """Also where the pool is too small for all of them; and every answer is what it would be."""
    engine, runner = hashing_engine(
        num_blocks=num_blocks,
        options=rank_options(
            max_num_seqs=32, max_num_batched_tokens=max_num_batched_tokens, block_size=4
        ),
    )
    prompts = [[*range(group, group + 64), i, i + 1] for i in range(8) for group in range(4)]
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    requests = [assignment(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    outputs = run_to_end(engine, {0: requests})
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == greedy_continuation(prompt, 4)
    num_own = len(prompts) * (2 + 3)  # the prompt's last two, and all generated ones but the last
    if num_blocks == 400:
        assert runner.num_computed_tokens == 4 * 64 + num_own
    assert engine.step().stats.num_waiting == 0


def test_a_tenant_does_not_wait_for_another_ones_prefix() -> None:
    engine, _ = hashing_engine(options=rank_options(max_num_batched_tokens=100))
    for salt in (b"a", b"b"):
        engine.add(assignment(salt.decode(), SHARED, cache_salt=salt))
    assert len(engine.step().outputs) == 2


def test_the_figures_count_held_ones_as_waiting() -> None:
    engine, _ = hashing_engine(options=rank_options(max_num_batched_tokens=100))
    for i in range(3):
        engine.add(assignment(str(i), [*SHARED, i]))
    stats = engine.step().stats
    assert (stats.num_running, stats.num_waiting) == (1, 2)
    engine.abort(RequestId("2"))
    stats = engine.step().stats
    assert (stats.num_running, stats.num_waiting) == (2, 0)
