from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.block_pool import BlockPool
from cache.prefix_hash import PrefixHasher
from gpu_worker.engine.iteration_scheduler import IterationScheduler
from gpu_worker.engine.sequence import Sequence
from support.engine_fakes import assignment

BLOCK_SIZE = 4
HASHER = PrefixHasher(model="m", cache_format="f", salt=b"", block_size=BLOCK_SIZE)


def sequence(name: str, num_prompt_tokens: int, *, first_token: int = 0) -> Sequence:
    return Sequence(
        assignment(name, range(first_token, first_token + num_prompt_tokens)),
        seed=0,
        stop_token_ids=frozenset(),
        max_num_tokens=1000,
        hasher=HASHER,
    )


def scheduler(
    *, num_blocks: int = 100, max_num_seqs: int = 8, budget: int = 16, caching: bool = True
) -> IterationScheduler:
    return IterationScheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
    )


def step(of: IterationScheduler) -> dict[str, int]:
    """One step in which every sequence that is complete gets a token; what ran, by name."""
    schedule = of.schedule()
    of.complete(schedule)
    for seq in schedule:
        if seq.num_uncomputed == 0:
            seq.append(0)
    return {seq.request_id: num_tokens for seq, num_tokens in schedule.items()}


def test_a_prompt_is_cut_to_the_budget_and_the_rest_follows() -> None:
    one = scheduler(budget=16)
    one.add(sequence("a", 40))
    assert [step(one) for _ in range(4)] == [{"a": 16}, {"a": 16}, {"a": 8}, {"a": 1}]


def test_decodes_come_first_then_started_prompts_then_new_ones() -> None:
    one = scheduler(budget=16)
    one.add(sequence("generating", 3))
    step(one)
    one.add(sequence("long", 25, first_token=100))
    one.add(sequence("new", 5, first_token=200))
    assert step(one) == {"generating": 1, "long": 15}
    assert list(step(one).items()) == [("generating", 1), ("long", 10), ("new", 5)]


def test_no_more_sequences_run_than_there_are_rows() -> None:
    one = scheduler(max_num_seqs=2)
    for name in "abc":
        one.add(sequence(name, 2))
    assert list(step(one)) == ["a", "b"]
    one.remove(one.running[0])
    assert list(step(one)) == ["b", "c"]
    assert {seq.row for seq in one.running} == {0, 1}


def test_a_sequence_that_does_not_fit_is_not_overtaken() -> None:
    one = scheduler(num_blocks=6, caching=False)
    one.add(sequence("running", 12))
    step(one)
    one.add(sequence("big", 16))
    one.add(sequence("small", 2))
    assert list(step(one)) == ["running"]
    one.remove(one.running[0])
    assert list(step(one)) == ["big"]


def test_the_youngest_is_preempted_and_resumes_before_all_that_wait() -> None:
    one = scheduler(num_blocks=4, caching=False)
    for name in ("old", "young"):
        one.add(sequence(name, 8))
    step(one)
    one.add(sequence("later", 1))
    assert step(one) == {"old": 1}
    assert [seq.request_id for seq in one.waiting] == ["young", "later"]
    one.remove(one.running[0])
    assert step(one) == {"young": 9, "later": 1}


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    one = scheduler(num_blocks=5)
    one.add(sequence("old", 8))
    one.add(sequence("young", 8, first_token=50))
    step(one)
    assert step(one) == {"old": 1}
    assert one.num_preemptions == 1
    one.remove(one.running[0])
    assert step(one) == {"young": 1}


class RandomTraffic(RuleBasedStateMachine):
    """Sequences come, run, end and are aborted in any order, in a pool often too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(num_blocks=12, max_num_seqs=4, budget=10)
        self.arrival: dict[Sequence, int] = {}
        self.alive: list[Sequence] = []

    @rule(num_tokens=st.integers(1, 30), stem=st.integers(0, 1))
    def arrive(self, num_tokens: int, stem: int) -> None:
        seq = sequence(f"s{len(self.arrival)}", num_tokens, first_token=stem)
        self.arrival[seq] = len(self.arrival)
        self.alive.append(seq)
        self.scheduler.add(seq)

    @precondition(lambda self: self.alive)
    @rule(end_probability=st.floats(0, 1), choose=st.randoms(use_true_random=False))
    def run(self, end_probability: float, choose: random.Random) -> None:
        oldest = self.alive[0]
        before = oldest.num_computed
        schedule = self.scheduler.schedule()
        assert 0 < sum(schedule.values()) <= 10
        assert oldest in schedule or oldest.num_uncomputed > 0
        for seq, num_tokens in schedule.items():
            assert seq.row is not None
            room = len(seq.block_table) * BLOCK_SIZE
            assert 0 < num_tokens <= seq.num_uncomputed
            assert seq.num_computed + num_tokens <= room
        self.scheduler.complete(schedule)
        assert oldest.num_computed > before, "the oldest always gets on: nothing starves"
        for seq in schedule:
            if seq.num_uncomputed == 0:
                seq.append(seq.num_tokens % 2)
                if choose.random() < end_probability or seq.num_tokens >= 12 * BLOCK_SIZE:
                    self.remove(seq)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.alive)))

    def remove(self, seq: Sequence) -> None:
        self.alive.remove(seq)
        self.scheduler.remove(seq)
        assert not seq.block_table

    @invariant()
    def nothing_leaks(self) -> None:
        self.scheduler.pool.check_integrity(seq.block_table for seq in self.alive)
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert queued == sorted(self.alive, key=self.arrival.__getitem__)
        rows = [seq.row for seq in self.scheduler.running]
        assert len(set(rows)) == len(rows) <= 4
        assert all(row in range(4) for row in rows)
        assert all(seq.row is None for seq in self.scheduler.waiting)


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
