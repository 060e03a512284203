"""Engines that give each other blocks through host memory, between their steps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.engine.engine import Engine
from support.engine_fakes import (
    HashingRunner,
    assignment,
    greedy_continuation,
    hashing_engine,
    run_to_end,
    spelled_out,
    tokens_of,
)
from wire.ids import BlockHash, RequestId, token_ids
from wire.sampling import SamplingParams

BLOCK_SIZE = 4
PROMPT = list(range(17))


def chain(engine: Engine, prompt: list[int]) -> list[BlockHash]:
    return engine._hasher(b"").hash_blocks(token_ids(prompt))


def send(
    source: tuple[Engine, HashingRunner], target: tuple[Engine, HashingRunner], prompt: list[int]
) -> int:
    """Copy what is pinned and ready of a prompt from slot to slot; how many blocks it was."""
    hashes = chain(source[0], prompt)
    pinned = source[0].cache.pin(hashes)
    while source[0].has_work:
        source[0].step()
    num_ready = source[0].cache.num_ready(pinned)
    reserved = target[0].cache.reserve(num_ready)
    if reserved is not None:
        target[1]._host[reserved] = source[1]._host[pinned[:num_ready]]
        assert target[0].cache.adopt(hashes[:num_ready], reserved)
    source[0].cache.unpin(pinned)
    return num_ready


def test_what_one_engine_computed_another_uses() -> None:
    source, target = hashing_engine(num_host_blocks=8), hashing_engine(num_host_blocks=8)
    run_to_end(source[0], {0: [assignment("first", PROMPT)]})
    assert send(source, target, PROMPT) == 4
    outputs = run_to_end(target[0], {0: [assignment("second", PROMPT)]})["second"]
    assert outputs[0].num_cached_tokens == 16
    assert tokens_of(outputs) == greedy_continuation(PROMPT, 16)
    assert target[1].num_computed_tokens == 1 + 15


def test_an_idle_engine_copies_what_was_pinned_in_a_step_that_computes_nothing() -> None:
    engine, runner = hashing_engine(num_host_blocks=8)
    run_to_end(engine, {0: [assignment("first", PROMPT)]})
    num_computed = runner.num_computed_tokens
    pinned = engine.cache.pin(chain(engine, PROMPT))
    assert engine.cache.num_ready(pinned) == 0
    num_steps = 0
    while engine.has_work:
        assert engine.step().stats.num_step_tokens == 0
        num_steps += 1
    assert num_steps == 1
    assert engine.cache.num_ready(pinned) == 4
    assert runner._host[pinned].flatten().tolist() == PROMPT[:16]
    assert runner.num_computed_tokens == num_computed
    engine.cache.unpin(pinned)
    engine.check_integrity()


def test_what_was_pinned_is_copied_with_the_next_step_of_a_busy_engine() -> None:
    engine, runner = hashing_engine(num_host_blocks=8)
    engine.add(assignment("first", PROMPT))
    engine.step()
    pinned = engine.cache.pin(chain(engine, PROMPT))
    assert engine.step().stats.num_step_tokens == 1
    assert engine.cache.num_ready(pinned) == 4
    assert runner._host[pinned].flatten().tolist() == PROMPT[:16]


class TwoEngines(RuleBasedStateMachine):
    """Requests come, wait, are preempted, aborted and fail in two engines that share prefixes.

    The model hashes every token that a sequence reads, so whatever was written, evicted, replaced
    or received wrongly would change an answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.engines = [hashing_engine(num_blocks=10, num_host_blocks=6) for _ in range(2)]
        self.prompts: dict[tuple[int, RequestId], list[int]] = {}
        self.answers: dict[tuple[int, RequestId], list[int]] = {}
        self.sent: list[tuple[int, list[BlockHash], list[int]]] = []  # source, chain, slots

    @rule(
        which=st.integers(0, 1),
        stem=st.integers(0, 1),
        num_shared=st.integers(1, 20),
        tail=st.lists(st.integers(40, 42), max_size=5),
        max_tokens=st.integers(1, 12),
    )
    def add(self, which: int, stem: int, num_shared: int, tail: list[int], max_tokens: int) -> None:
        request_id = RequestId(str(len(self.prompts)))
        prompt = [*range(stem, stem + num_shared), *tail]
        self.prompts[which, request_id] = prompt
        self.answers[which, request_id] = []
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        self.engines[which][0].add(assignment(request_id, prompt, sampling))

    @rule(which=st.integers(0, 1), num_steps=st.integers(1, 6))
    def step(self, which: int, num_steps: int) -> None:
        engine = self.engines[which][0]
        for _ in range(num_steps):
            for output in spelled_out(engine, engine.step()):
                self.answers[which, output.request_id] += output.token_ids

    @precondition(lambda self: self.engines[0][0]._sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        engine = self.engines[0][0]
        engine.abort(data.draw(st.sampled_from(sorted(engine._sequences))))

    @precondition(lambda self: self.engines[0][0]._scheduler.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        engine = self.engines[0][0]
        engine._fail(data.draw(st.sampled_from(engine._scheduler.running)))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), which=st.integers(0, 1))
    def pin(self, data: st.DataObject, which: int) -> None:
        prompt = self.prompts[data.draw(st.sampled_from(sorted(self.prompts)))]
        engine = self.engines[which][0]
        hashes = chain(engine, prompt)
        slots = engine.cache.pin(hashes)
        self.sent.append((which, hashes[: len(slots)], slots))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), arrives=st.booleans())
    def end_sending(self, data: st.DataObject, arrives: bool) -> None:
        """What is ready by now arrives at the other engine, or is lost on the way."""
        index = data.draw(st.integers(0, len(self.sent) - 1))
        which, hashes, pinned = self.sent.pop(index)
        source, target = self.engines[which], self.engines[1 - which]
        num_ready = source[0].cache.num_ready(pinned)
        reserved = target[0].cache.reserve(num_ready)
        if reserved is not None:
            target[1]._host[reserved] = source[1]._host[pinned[:num_ready]]
            if arrives:
                assert target[0].cache.adopt(hashes[:num_ready], reserved)
            else:
                target[0].cache.unpin(reserved)
        source[0].cache.unpin(pinned)

    @invariant()
    def nothing_contradicts_itself(self) -> None:
        for engine, _ in self.engines:
            engine.check_integrity()

    def teardown(self) -> None:
        """All that are left get to their end, and every answer is what it would be alone."""
        for which, _, slots in self.sent:
            self.engines[which][0].cache.unpin(slots)
        for which, (engine, _) in enumerate(self.engines):
            while engine.has_work:
                self.step(which, 1)
            engine.check_integrity()
            assert engine.cache.device.num_held == engine.cache.host.num_held == 0
        for key, answer in self.answers.items():
            assert answer == greedy_continuation(self.prompts[key], len(answer))


TestTwoEngines = TwoEngines.TestCase
TestTwoEngines.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
