"""Continuous batching: requests join and leave between any two steps of the model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Protocol

from torch import Tensor

from cache.prefix_hash import PrefixHasher
from cache.tiers import TieredCache
from gpu_worker.engine.iteration_scheduler import IterationScheduler, Schedule
from gpu_worker.engine.random_numbers import seed_to_uint64
from gpu_worker.engine.sampler import Sampled, Sampler
from gpu_worker.engine.sequence import End, Sequence
from gpu_worker.engine.step_builder import StepBuilder, copying_step
from gpu_worker.engine.validation import validate
from gpu_worker.kernels import library as kernels
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import (
    NO_CHANGES,
    CacheChanges,
    EngineStats,
    RawLogprob,
    SequenceOutput,
    StepOutput,
)
from gpu_worker.step_plan import StepPlan
from wire.errors import InvalidRequest
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import Assignment, ErrorInfo

NUMERICAL_ERROR = "numerical_error"
"""The error code of a request for which the model gave NaN or infinite logits."""

CPU_STEP_TOKENS = 1024
GPU_STEP_TOKENS = 8192
"""Prompts go through a processor at the same rate from 256 tokens a step on, and what generates
waits less between two tokens; a GPU needs some thousands to be busy."""

_NUM_SALTS = 1024


class Runner(Protocol):
    """What executes steps: one process's model, or the lead of several."""

    def execute(self, plan: StepPlan) -> Tensor:
        """Logits of the plan's `logits_rows`: (num_samples, vocab_size) float32, to be changed.

        A plan without tokens has copies to be made, and nothing to be computed.
        """


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What the engine must know of the model and the cache that its runner holds.

    `cache_format` names the model's contents and all else that changes a cached block's bytes for
    the same tokens. Host memory has room for `num_host_blocks` blocks. `step_tokens` is how many
    tokens a step has at most if nobody says.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    cache_format: str
    num_host_blocks: int = 0
    step_tokens: int = CPU_STEP_TOKENS


class Engine:
    """Runs requests: `add`, then `step` while `has_work`; one thread calls all of it.

    Between steps that thread may also share what is in `cache` with other groups.
    """

    def __init__(self, runner: Runner, model: EngineModel, options: RankOptions) -> None:
        # A sequence that had the whole pool to itself could not grow beyond this.
        self.max_model_len = min(model.max_model_len, model.num_blocks * options.block_size)
        self.num_blocks = model.num_blocks
        self.vocab_size = model.vocab_size
        self.cache_format = model.cache_format
        self.cache = TieredCache(model.num_blocks, options.block_size, model.num_host_blocks)
        self._runner = runner
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._scheduler = IterationScheduler(
            self.cache,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens or model.step_tokens,
            prefix_caching=options.prefix_caching,
        )
        self._step_builder = StepBuilder(
            max_num_seqs=options.max_num_seqs,
            max_blocks_per_seq=self.cache.num_blocks_for(self.max_model_len),
            block_size=options.block_size,
        )
        self._sampler = Sampler(
            max_num_seqs=options.max_num_seqs,
            vocab_size=model.vocab_size,
            use_kernels=kernels.isa() is not None,
        )
        self._sequences: dict[RequestId, Sequence] = {}
        self._indices = count()
        self._ended_early: list[SequenceOutput] = []  # refused, or complete as they came
        self._to_wipe: list[int] = []  # blocks with numbers that are none, before the next step
        self._num_generated_tokens = 0

        @lru_cache(maxsize=_NUM_SALTS)
        def hasher(salt: bytes) -> PrefixHasher:
            return PrefixHasher(
                model=options.model_name,
                cache_format=model.cache_format,
                salt=salt,
                block_size=options.block_size,
            )

        self._hasher = hasher

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._ended_early or self.cache.has_copies)

    def add(self, assignment: Assignment) -> None:
        """Queue a request; one that cannot be served ends with an error in the next step's outputs.

        A request that is already here is replaced if the new fence is higher, else kept.
        """
        running = self._sequences.get(assignment.request_id)
        if running is not None:
            if running.assignment.fence >= assignment.fence:
                return
            self.abort(assignment.request_id)
        try:
            validate(assignment, max_model_len=self.max_model_len, vocab_size=self.vocab_size)
        except InvalidRequest as error:
            self._ended_early.append(
                _failure(assignment, ErrorInfo(error.code, str(error), error.field))
            )
            return
        sequence = self._make_sequence(assignment)
        end = sequence.end() if sequence.num_generated else None
        if end is not None:
            self._ended_early.append(_output(sequence, (), None, end))
            return
        self._sequences[assignment.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: RequestId) -> None:
        """Drop a request and what it holds; no output will name it. Unknown ids are ignored."""
        self._ended_early = [o for o in self._ended_early if o.request_id != request_id]
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> StepOutput:
        """Compute one step and return what it gave: schedule, run, postprocess."""
        started_s = time.perf_counter()
        outputs, self._ended_early = self._ended_early, []
        indices, tokens = token_ids(), token_ids()
        schedule = self._scheduler.schedule()
        num_tokens = sum(schedule.values())
        if schedule:
            plan, sampling = self._build(schedule)
            logits = self._runner.execute(plan)
            self._scheduler.complete(schedule)
            if sampling:
                sampled = self._sampler.sample(logits, sampling)
                outputs += self._apply(sampling, sampled, indices, tokens)
        elif self.cache.has_copies:
            copies_out, _ = self.cache.take_copies()
            self._runner.execute(copying_step(copies_out))
        moves = self.cache.take_moves()
        changes = NO_CHANGES if moves is None else CacheChanges(*moves)
        stats = self._stats(num_tokens, time.perf_counter() - started_s)
        return StepOutput(tuple(outputs), stats, indices, tokens, changes)

    def check_integrity(self) -> None:
        """Raise AssertionError if the blocks' bookkeeping contradicts itself; for idle moments."""
        self.cache.check_integrity(s.block_table for s in self._sequences.values())

    def _build(self, schedule: Schedule) -> tuple[StepPlan, list[Sequence]]:
        """The step's plan, with the copies and wipes due before it, and who samples."""
        copies_out, copies_in = self.cache.take_copies()
        overwritten = {copy.block_id for copy in copies_in}
        plan, sampling = self._step_builder.build(
            schedule,
            copies_out=copies_out,
            wiped_blocks=[block_id for block_id in self._to_wipe if block_id not in overwritten],
            copies_in=copies_in,
        )
        self._to_wipe = []
        return plan, sampling

    def _make_sequence(self, assignment: Assignment) -> Sequence:
        params = assignment.sampling
        eos = frozenset[int]() if params.ignore_eos else self._eos_token_ids
        max_num_tokens = self.max_model_len
        if params.max_tokens is not None:
            num_wanted = len(assignment.prompt_token_ids) + params.max_tokens
            max_num_tokens = min(max_num_tokens, num_wanted)
        return Sequence(
            next(self._indices),
            assignment,
            seed=seed_to_uint64(params.seed),
            stop_token_ids=eos.union(params.stop_token_ids) if params.stop_token_ids else eos,
            max_num_tokens=max_num_tokens,
            hasher=self._hasher(assignment.cache_salt),
        )

    def _apply(
        self, sampling: list[Sequence], sampled: Sampled, indices: TokenIds, tokens: TokenIds
    ) -> list[SequenceOutput]:
        """Take in what was drawn: plain tokens go to the columns, the rest is returned."""
        outputs = []
        logprobs = sampled.logprobs or [None] * len(sampling)
        for sequence, token_id, logprob in zip(sampling, sampled.token_ids, logprobs, strict=True):
            if token_id is None:
                outputs.append(self._fail(sequence))
                continue
            sequence.append(token_id)
            end = sequence.end()
            if end is None and logprob is None and sequence.is_known:
                indices.append(sequence.index)
                tokens.append(token_id)
                continue
            if end is not None:
                del self._sequences[sequence.request_id]
                self._scheduler.remove(sequence)
            outputs.append(_output(sequence, (token_id,), logprob, end))
            sequence.is_known = True
        self._num_generated_tokens += len(sampling) - sampled.token_ids.count(None)
        return outputs

    def _fail(self, sequence: Sequence) -> SequenceOutput:
        """End a sequence for which the model gave numbers that are none; its neighbours go on."""
        del self._sequences[sequence.request_id]
        self._to_wipe += self._scheduler.discard(sequence)
        message = (
            f"the model's logits for token {sequence.num_generated} of the answer are not finite"
        )
        return _failure(sequence.assignment, ErrorInfo(NUMERICAL_ERROR, message))

    def _stats(self, num_step_tokens: int, step_s: float) -> EngineStats:
        scheduler, device = self._scheduler, self.cache.device
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=device.num_blocks,
            num_free_blocks=device.num_free,
            num_step_tokens=num_step_tokens,
            step_s=step_s,
            num_prefill_tokens_total=scheduler.num_prefill_tokens,
            num_cached_tokens_total=scheduler.num_cached_tokens,
            num_generated_tokens_total=self._num_generated_tokens,
            num_preemptions_total=scheduler.num_preemptions,
        )


def _output(
    sequence: Sequence,
    new_token_ids: tuple[int, ...],
    logprob: RawLogprob | None,
    end: End | None,
) -> SequenceOutput:
    return SequenceOutput(
        request_id=sequence.request_id,
        fence=sequence.assignment.fence,
        token_ids=token_ids(new_token_ids),
        logprobs=None if logprob is None else (logprob,),
        finish_reason=None if end is None else end.reason,
        stop_token_id=None if end is None else end.stop_token_id,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        index=sequence.index,
    )


def _failure(assignment: Assignment, error: ErrorInfo) -> SequenceOutput:
    return SequenceOutput(
        request_id=assignment.request_id,
        fence=assignment.fence,
        error=error,
        num_prompt_tokens=len(assignment.prompt_token_ids),
    )
