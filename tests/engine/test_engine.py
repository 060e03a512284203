from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from gpu_worker.engine.engine import Engine
from gpu_worker.rank_protocol import SequenceOutput
from gpu_worker.step_plan import StepPlan
from support.engine_fakes import (
    VOCAB_SIZE,
    HashingRunner,
    assignment,
    greedy_continuation,
    hashing_engine,
    rank_options,
    run_to_end,
    spelled_out,
    tokens_of,
)
from wire.ids import RequestId
from wire.messages import Assignment
from wire.sampling import SamplingParams

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def random_prompts(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of which many share a prefix."""
    choose = random.Random(seed)
    stems = [[choose.randrange(VOCAB_SIZE) for _ in range(20)] for _ in range(3)]
    return [
        choose.choice(stems)[: choose.randrange(20)]
        + [choose.randrange(VOCAB_SIZE) for _ in range(choose.randrange(1, longest - 19))]
        for _ in range(count)
    ]


def run_one(request: Assignment, *, eos_token_ids: tuple[int, ...] = ()) -> list[SequenceOutput]:
    engine, _ = hashing_engine(eos_token_ids=eos_token_ids)
    return run_to_end(engine, {0: [request]})[request.request_id]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [16, 256])
@pytest.mark.parametrize("max_num_batched_tokens", [5, 64])
def test_every_request_gets_what_it_would_get_alone(
    prefix_caching: bool, num_blocks: int, max_num_batched_tokens: int
) -> None:
    prompts = random_prompts(24)
    options = rank_options(
        prefix_caching=prefix_caching, max_num_batched_tokens=max_num_batched_tokens
    )
    engine, _ = hashing_engine(num_blocks=num_blocks, options=options)
    arrivals: dict[int, list[Assignment]] = {}
    for i, prompt in enumerate(prompts):
        arrivals.setdefault(i * 2 // 3, []).append(assignment(str(i), prompt))
    outputs = run_to_end(engine, arrivals)
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == greedy_continuation(prompt, 16)
        assert [output.finish_reason for output in outputs[str(i)]] == [None] * 15 + ["length"]


def test_a_pool_too_small_for_all_preempts_and_loses_nothing() -> None:
    requests = [
        assignment(str(i), prompt, SamplingParams(seed=i, max_tokens=20, temperature=0.9))
        for i, prompt in enumerate(random_prompts(12))
    ]
    engine, _ = hashing_engine(num_blocks=18)
    tight = run_to_end(engine, {0: requests})
    roomy_engine, _ = hashing_engine(num_blocks=512)
    roomy = run_to_end(roomy_engine, {0: requests})
    assert engine.step().stats.num_preemptions_total > 0
    assert roomy_engine.step().stats.num_preemptions_total == 0
    assert {i: tokens_of(o) for i, o in tight.items()} == {
        i: tokens_of(o) for i, o in roomy.items()
    }


def test_a_seed_draws_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    sampling = SamplingParams(seed=42, temperature=1.3, top_p=0.9, top_k=30, max_tokens=24)
    alone = tokens_of(run_one(assignment("r", PROMPT, sampling)))
    others = [
        assignment(f"other-{i}", prompt, SamplingParams(seed=i, max_tokens=9 + i))
        for i, prompt in enumerate(random_prompts(6))
    ]
    engine, _ = hashing_engine()
    crowd = run_to_end(
        engine, {0: others[:3], 2: [assignment("r", PROMPT, sampling)], 5: others[3:]}
    )
    assert tokens_of(crowd["r"]) == alone


def test_without_a_seed_two_runs_differ() -> None:
    sampling = SamplingParams(temperature=2.0, max_tokens=24)
    runs = [tokens_of(run_one(assignment("r", PROMPT, sampling))) for _ in range(2)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("num_done", [1, 7, 23])
def test_a_resumed_request_goes_on_as_if_it_had_never_stopped(num_done: int) -> None:
    sampling = SamplingParams(
        seed=7,
        temperature=1.5,
        max_tokens=24,
        min_tokens=12,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
    )
    eos_token_ids = tuple(range(0, VOCAB_SIZE, 3))
    whole = tokens_of(run_one(assignment("r", PROMPT, sampling), eos_token_ids=eos_token_ids))
    assert len(whole) > 12, "stops are masked before min_tokens"
    done = whole[: min(num_done, len(whole) - 1)]
    resumed = assignment("r", PROMPT, sampling, fence=2, generated=done)
    outputs = run_one(resumed, eos_token_ids=eos_token_ids)
    assert done + tokens_of(outputs) == whole
    assert {output.fence for output in outputs} == {2}


def test_a_request_that_had_everything_but_its_end_is_ended_at_once() -> None:
    generated = greedy_continuation(PROMPT, 16)
    (output,) = run_one(assignment("r", PROMPT, generated=generated))
    assert (output.finish_reason, list(output.token_ids)) == ("length", [])
    eos = generated[-1]
    (output,) = run_one(
        assignment("r", PROMPT, SamplingParams(temperature=0.0), generated=generated),
        eos_token_ids=(eos,),
    )
    assert (output.finish_reason, output.stop_token_id) == ("stop", eos)


def test_the_end_of_sequence_ends_it_and_is_part_of_the_output() -> None:
    expected = greedy_continuation(PROMPT, 16)
    eos = expected[5]
    outputs = run_one(assignment("r", PROMPT), eos_token_ids=(eos,))
    assert tokens_of(outputs) == expected[: expected.index(eos) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", eos)


def test_ignore_eos_goes_on_and_stop_token_ids_still_count() -> None:
    expected = greedy_continuation(PROMPT, 16)
    eos, stop = expected[3], expected[8]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=16, ignore_eos=True, stop_token_ids=(stop,)
    )
    outputs = run_one(assignment("r", PROMPT, sampling), eos_token_ids=(eos,))
    assert tokens_of(outputs) == expected[: expected.index(stop) + 1]
    assert outputs[-1].stop_token_id == stop


def test_the_end_of_the_context_ends_a_request_without_max_tokens() -> None:
    engine, _ = hashing_engine(max_model_len=30)
    request = assignment("r", PROMPT, SamplingParams(temperature=0.0))
    outputs = run_to_end(engine, {0: [request]})["r"]
    assert tokens_of(outputs) == greedy_continuation(PROMPT, 30 - len(PROMPT))
    assert outputs[-1].finish_reason == "length"


def test_the_pool_bounds_the_context_and_one_sequence_may_use_all_of_it() -> None:
    engine, _ = hashing_engine(num_blocks=5, options=rank_options(block_size=4))
    assert engine.max_model_len == 20
    request = assignment("r", PROMPT, SamplingParams(temperature=0.0))
    outputs = run_to_end(engine, {0: [request, assignment("other", [1, 2, 3])]})
    assert tokens_of(outputs["r"]) == greedy_continuation(PROMPT, 13)
    assert tokens_of(outputs["other"]) == greedy_continuation([1, 2, 3], 16)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (assignment("r", []), "invalid_request", "prompt"),
        (assignment("r", range(20)), "context_length_exceeded", "prompt"),
        (assignment("r", [1, VOCAB_SIZE]), "invalid_request", "prompt"),
        (assignment("r", [1], generated=[2**32 - 1]), "invalid_request", "generated"),
        (
            assignment("r", [1], SamplingParams(stop_token_ids=(VOCAB_SIZE,))),
            "invalid_request",
            "stop_token_ids",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_good_neighbours_still_finish(
    request_: Assignment, code: str, field: str
) -> None:
    engine, _ = hashing_engine(max_model_len=20)
    outputs = run_to_end(engine, {0: [request_, assignment("good", [1, 2])]})
    (refusal,) = outputs["r"]
    assert refusal.error is not None
    assert (refusal.error.code, refusal.error.field) == (code, field)
    assert refusal.finish_reason is None
    assert tokens_of(outputs["good"]) == greedy_continuation([1, 2], 16)


def test_an_aborted_request_is_not_heard_of_again_and_its_blocks_are_free() -> None:
    engine, _ = hashing_engine()
    engine.add(assignment("kept", PROMPT))
    engine.add(assignment("running", [1, 2, 3]))
    engine.step()
    engine.add(assignment("waiting", [4, 5, 6]))
    for request_id in ("running", "waiting", "unknown"):
        engine.abort(RequestId(request_id))
    outputs = run_to_end(engine, {0: []})
    assert set(outputs) == {"kept"}
    stats = engine.step().stats
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("num_steps", [0, 1, 5], ids=["waiting", "prefilling", "generating"])
def test_an_abort_frees_row_and_blocks_before_the_next_step(num_steps: int) -> None:
    """The only row goes to the next request in the very next step, and the figures say so."""
    engine, _ = hashing_engine(options=rank_options(max_num_seqs=1, max_num_batched_tokens=4))
    engine.add(assignment("unwanted", PROMPT))
    for _ in range(num_steps):
        engine.step()
    engine.abort(RequestId("unwanted"))
    engine.add(assignment("next", [1, 2, 3]))
    step = engine.step()
    assert [output.request_id for output in step.outputs] == ["next"]
    assert step.stats.num_running == 1
    assert step.stats.num_free_blocks == step.stats.num_blocks - 1
    engine.abort(RequestId("next"))
    stats = engine.step().stats
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    engine.check_integrity()


# Numbers that are none


class SpoilingRunner:
    """Passes steps on, and spoils the logits of the sequences whose last token is `victim`."""

    def __init__(self, runner: HashingRunner, victim: int) -> None:
        self.plans: list[StepPlan] = []
        self._runner = runner
        self._victim = victim

    def execute(self, plan: StepPlan) -> Tensor:
        self.plans.append(plan)
        logits = self._runner.execute(plan)
        logits[plan.token_ids[plan.logits_rows] == self._victim] = torch.nan
        return logits


def spoiling_engine(victim: int) -> tuple[Engine, SpoilingRunner]:
    engine, runner = hashing_engine()
    spoiling = SpoilingRunner(runner, victim)
    engine._runner = spoiling
    return engine, spoiling


def test_a_sequence_without_finite_logits_ends_in_an_error_and_its_neighbours_go_on() -> None:
    expected, neighbours = greedy_continuation(PROMPT, 16), greedy_continuation([1, 2], 16)
    num_good = next(i for i in range(3, 16) if expected[i - 1] not in neighbours)
    engine, _ = spoiling_engine(victim=expected[num_good - 1])
    outputs = run_to_end(engine, {0: [assignment("good", [1, 2]), assignment("bad", PROMPT)]})
    assert tokens_of(outputs["bad"]) == expected[:num_good], "it keeps what it had"
    last = outputs["bad"][-1]
    assert (last.finish_reason, list(last.token_ids)) == (None, [])
    assert last.error is not None
    assert last.error.code == "numerical_error"
    assert [output.error for output in outputs["bad"][:-1]] == [None] * num_good
    assert tokens_of(outputs["good"]) == neighbours
    stats = engine.step().stats
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_generated_tokens_total == num_good + 16


def test_what_a_failed_sequence_has_cached_is_used_by_nobody_and_wiped() -> None:
    """Else another attempt, or another request with this prefix, would meet the same NaN."""
    prompt = list(range(16))
    engine, runner = spoiling_engine(victim=prompt[-1])
    run_to_end(engine, {0: [assignment("bad", prompt)]})
    assert runner.plans[-1].num_tokens == 16
    again = run_to_end(engine, {0: [assignment("again", [*prompt, 3])]})["again"]
    assert again[0].num_cached_tokens == 0
    [wiping] = [plan for plan in runner.plans if len(plan.wiped_blocks)]
    assert wiping is runner.plans[1], "the first that could read them"
    assert set(runner.plans[0].block_tables[0].tolist()) == set(wiping.wiped_blocks.tolist())
    assert tokens_of(again) == greedy_continuation([*prompt, 3], 16)


def test_blocks_that_another_sequence_holds_are_not_wiped_under_it() -> None:
    prefix = list(range(8))
    engine, runner = spoiling_engine(victim=50)
    outputs = run_to_end(
        engine,
        {0: [assignment("holder", [*prefix, 1])], 2: [assignment("bad", [*prefix, 50])]},
    )
    assert outputs["bad"][-1].error is not None
    shared = runner.plans[0].block_tables[0].tolist()[:2]
    wiped = {block for plan in runner.plans for block in plan.wiped_blocks.tolist()}
    assert wiped
    assert not wiped & set(shared)
    assert tokens_of(outputs["holder"]) == greedy_continuation([*prefix, 1], 16)


def test_a_higher_fence_replaces_a_request_and_a_lower_or_equal_one_does_not() -> None:
    engine, _ = hashing_engine()
    engine.add(assignment("r", PROMPT, fence=3))
    engine.step()
    engine.add(assignment("r", [1], fence=2))
    engine.add(assignment("r", [1], fence=3))
    assert {o.fence for o in spelled_out(engine, engine.step())} == {3}
    engine.add(assignment("r", [1, 2], fence=4))
    outputs = run_to_end(engine, {0: []})["r"]
    assert {o.fence for o in outputs} == {4}
    assert tokens_of(outputs) == greedy_continuation([1, 2], 16)


def test_a_shared_prefix_is_computed_once_and_the_last_token_always() -> None:
    engine, runner = hashing_engine(options=rank_options(block_size=4))
    prompt = list(range(16))
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    run_to_end(engine, {0: [assignment("first", prompt, sampling)]})
    assert runner.num_computed_tokens == 16
    again = run_to_end(engine, {0: [assignment("again", prompt, sampling)]})["again"]
    assert again[0].num_cached_tokens == 12
    assert runner.num_computed_tokens == 20
    assert tokens_of(again) == greedy_continuation(prompt, 1)


def test_blocks_of_generated_tokens_are_reused_too() -> None:
    engine, _ = hashing_engine(options=rank_options(block_size=4))
    first = tokens_of(run_to_end(engine, {0: [assignment("turn-1", PROMPT)]})["turn-1"])
    follow_up = [*PROMPT, *first, 1, 2]
    second = run_to_end(engine, {0: [assignment("turn-2", follow_up)]})["turn-2"]
    # The last generated token was never fed back, so its block, the sixth, was not filled.
    assert second[0].num_cached_tokens == 20
    assert tokens_of(second) == greedy_continuation(follow_up, 16)


def test_tenants_do_not_see_each_others_prefixes() -> None:
    engine, _ = hashing_engine()
    prompt = list(range(16))
    run_to_end(engine, {0: [assignment("a", prompt, cache_salt=b"a")]})
    outputs = run_to_end(engine, {0: [assignment("b", prompt, cache_salt=b"b")]})
    assert outputs["b"][0].num_cached_tokens == 0


def test_a_long_prompt_does_not_stall_those_that_generate() -> None:
    engine, _ = hashing_engine(options=rank_options(max_num_batched_tokens=8))
    sampling = SamplingParams(temperature=0.0, max_tokens=12)
    engine.add(assignment("short", [1, 2], sampling))
    engine.step()
    engine.add(assignment("long", range(60), sampling))
    for _ in range(8):
        step = engine.step()
        assert [output.request_id for output in spelled_out(engine, step)] == ["short"]
        assert step.stats.num_step_tokens == 8


def test_logprobs_come_with_the_tokens_that_ask_for_them() -> None:
    engine, _ = hashing_engine()
    wants = assignment("wants", PROMPT, SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))
    outputs = run_to_end(engine, {0: [wants, assignment("plain", [1])]})
    assert all(output.logprobs is None for output in outputs["plain"])
    for output in outputs["wants"]:
        assert output.logprobs is not None
        (logprob,) = output.logprobs
        assert logprob.token_id == output.token_ids[0] == logprob.top_token_ids[0]
        assert logprob.logprob == logprob.top_logprobs[0] >= logprob.top_logprobs[1]


# Outputs in columns


def test_plain_tokens_come_in_columns_between_a_sequences_first_and_last_output() -> None:
    engine, _ = hashing_engine()
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    engine.add(assignment("a", PROMPT, sampling))
    engine.add(assignment("b", [1, 2], sampling))
    first, *between, last = [engine.step() for _ in range(4)]
    index_of = {output.index: output.request_id for output in first.outputs}
    assert set(index_of.values()) == {"a", "b"}
    answers = {str(output.request_id): list(output.token_ids) for output in first.outputs}
    for step in between:
        assert step.outputs == ()
        for index, token_id in zip(step.indices, step.token_ids, strict=True):
            answers[index_of[index]].append(token_id)
    assert not last.indices
    assert not last.token_ids
    for output in last.outputs:
        assert output.finish_reason == "length"
        answers[output.request_id] += output.token_ids
    assert answers["a"] == greedy_continuation(PROMPT, 4)
    assert answers["b"] == greedy_continuation([1, 2], 4)


def test_what_asks_for_logprobs_never_comes_in_columns() -> None:
    engine, _ = hashing_engine()
    engine.add(assignment("r", PROMPT, SamplingParams(temperature=0.0, max_tokens=3, logprobs=1)))
    for step in (engine.step() for _ in range(3)):
        assert len(step.outputs) == 1
        assert not step.indices


def test_a_request_that_replaces_another_has_an_index_of_its_own() -> None:
    engine, _ = hashing_engine()
    indices = []
    for fence in (1, 2):
        engine.add(assignment("r", PROMPT, fence=fence))
        indices += [output.index for output in engine.step().outputs]
    assert len(set(indices)) == 2
    assert None not in indices
