from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.engine.sequence import Sequence
from support.scheduler_fakes import BLOCK_SIZE, scheduler, sequence, step


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
    one = scheduler(num_blocks=5, caching=False)
    for name in ("old", "young"):
        one.add(sequence(name, 8))
    step(one)
    one.add(sequence("later", 1))
    assert step(one) == {"old": 1}
    assert [seq.request_id for seq in one.waiting] == ["young", "later"]
    one.remove(one.running[0])
    assert step(one) == {"young": 9, "later": 1}


def test_admission_leaves_a_block_to_each_one_that_runs() -> None:
    one = scheduler(num_blocks=6, caching=False)
    for name in ("a", "b", "c"):
        one.add(sequence(name, 4))
    # Each needs one block, and a second one soon.
    assert list(step(one)) == ["a", "b", "c"]
    one.add(sequence("d", 4))
    assert list(step(one)) == ["a", "b", "c"]
    assert one.num_preemptions == 0
    one.remove(one.running[0])
    assert list(step(one)) == ["b", "c"], "its two blocks are those that the others may need"


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    one = scheduler(num_blocks=5)
    one.add(sequence("old", 8))
    one.add(sequence("young", 8, first_token=50))
    step(one)
    assert step(one) == {"old": 1}
    assert one.num_preemptions == 1
    one.remove(one.running[0])
    assert step(one) == {"young": 1}


def test_what_waiting_sequences_will_use_is_evicted_last() -> None:
    one = scheduler(num_blocks=6, max_num_seqs=1)
    for name, first_token in (("a", 0), ("b", 50)):
        one.add(sequence(name, 8, first_token=first_token))
        step(one)
        one.remove(one.running[0])
    one.add(sequence("other", 12, first_token=100))
    one.add(sequence("again", 8))
    assert step(one) == {"other": 12}
    one.remove(one.running[0])
    assert step(one) == {"again": 4}, "the contents that were used longer ago are still there"
    one.remove(one.running[0])


class RandomTraffic(RuleBasedStateMachine):
    """Sequences come, run, end and are aborted in any order, in a pool often too small for them.

    They share prefixes of many lengths, and some of what is preempted finds room in host memory.
    """

    MAX_TOKENS = 12 * BLOCK_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(num_blocks=12, max_num_seqs=4, budget=10, num_slots=5)
        self.alive: list[Sequence] = []

    @rule(num_tokens=st.integers(1, 30), stem=st.integers(0, 1))
    def arrive(self, num_tokens: int, stem: int) -> None:
        seq = sequence("s", num_tokens, first_token=stem)
        self.alive.append(seq)
        self.scheduler.add(seq)

    @precondition(lambda self: self.alive)
    @rule(end_probability=st.floats(0, 1), choose=st.randoms(use_true_random=False))
    def run(self, end_probability: float, choose: random.Random) -> None:
        schedule = self.scheduler.schedule()
        assert 0 < sum(schedule.values()) <= 10
        for seq, num_tokens in schedule.items():
            assert seq.row is not None
            room = len(seq.block_table) * BLOCK_SIZE
            assert 0 < num_tokens <= seq.num_uncomputed
            assert seq.num_computed + num_tokens <= room
        assert self.scheduler.running[0] in schedule, "the oldest that runs always gets on"
        blocks = [
            block_hash
            for seq in schedule
            for block_hash in seq.block_hashes[
                seq.num_computed // BLOCK_SIZE : (seq.num_tokens - 1) // BLOCK_SIZE
            ]
        ]
        assert len(set(blocks)) == len(blocks), "no block is computed twice"
        self.scheduler.cache.take_copies()
        self.scheduler.complete(schedule)
        for seq in schedule:
            if seq.num_uncomputed == 0:
                seq.append(seq.num_tokens % 2)
                if choose.random() < end_probability or seq.num_tokens >= self.MAX_TOKENS:
                    self.remove(seq)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.scheduler.running))
        self.alive.remove(seq)
        self.scheduler.discard(seq)

    def remove(self, seq: Sequence) -> None:
        self.alive.remove(seq)
        self.scheduler.remove(seq)
        assert not seq.block_table

    @invariant()
    def nothing_leaks(self) -> None:
        self.scheduler.cache.check_integrity(seq.block_table for seq in self.alive)
        running, waiting = self.scheduler.running, self.scheduler.waiting
        for queue in (running, waiting):
            assert queue == sorted(queue, key=lambda seq: seq.index)
        assert {*running, *waiting} == set(self.alive)
        rows = [seq.row for seq in running]
        assert len(set(rows)) == len(rows) <= 4
        assert all(row in range(4) for row in rows)
        assert all(seq.row is None for seq in waiting)
        assert self.scheduler.cache.host.num_held == 0, "slots are held within a step only"

    def teardown(self) -> None:
        """Whatever has happened, all that are left get to their end: nobody waits forever."""
        choose = random.Random(0)
        for _ in range(len(self.alive) * (self.MAX_TOKENS + 30)):
            if self.alive:
                self.run(0.1, choose)
        assert not self.alive
        self.nothing_leaks()


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
