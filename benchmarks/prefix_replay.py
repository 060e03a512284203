"""Replaying a workload through the engine's policies, without a model, a clock or a network.

A group here is what decides in a real one: the iteration scheduler, its sequences and hashes, and
the cache's bookkeeping. A step's tokens count as computed at once. The groups' queues are kept as
full as their credits allow, as when there is more to do than can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from benchmarks.prefix_oracle import Future
from benchmarks.prefix_workloads import BLOCK_SIZE, Ask, Workload
from cache.prefix_hash import PrefixHasher
from cache.tiers import TieredCache
from gpu_worker.engine.iteration_scheduler import IterationScheduler
from gpu_worker.engine.sequence import Sequence as EngineSequence
from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.planning import BatchLimits, Planner
from wire.ids import BlockHash, GroupId, RequestId, token_ids
from wire.messages import Assignment, GroupStatus, Prompt, Request
from wire.records import Journaled
from wire.sampling import SamplingParams
from wire.scripts import CachedPrefix, Queued

MODEL, CACHE_FORMAT = "model", "format"
HASHER = PrefixHasher(model=MODEL, cache_format=CACHE_FORMAT, salt=b"", block_size=BLOCK_SIZE)
STEP_S = 0.05
"""What a step counts for where policies look at the time."""

_FIRST_NEW_TOKEN = 1 << 31
_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Limits:
    """One group's; `max_num_owned` are its credits."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_owned: int


class ReplayedGroup:
    """A worker group's policies around a cache."""

    def __init__(self, cache: TieredCache, limits: Limits, future: Future | None = None) -> None:
        self.cache = cache
        self.num_owned = 0
        self.num_cached_tokens = 0  # of prompts, when they were first admitted
        self.num_preemptions = 0
        self._scheduler = IterationScheduler(
            cache,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prefix_caching=True,
        )
        self._future = future
        self._numbers: dict[EngineSequence, int] = {}
        self._new_tokens = count(_FIRST_NEW_TOKEN)

    def add(self, number: int, ask: Ask) -> None:
        """Queue a request."""
        self.num_owned += 1
        assignment = Assignment(RequestId(str(number)), 1, ask.prompt, _SAMPLING, stream=False)
        sequence = EngineSequence(
            number,
            assignment,
            seed=0,
            stop_token_ids=frozenset(),
            max_num_tokens=len(ask.prompt) + ask.num_output_tokens,
            hasher=HASHER,
        )
        self._numbers[sequence] = number
        self._scheduler.add(sequence)

    def fetch(self, source: ReplayedGroup, chain: Sequence[BlockHash]) -> None:
        """Have a prefix from another group, as far as both have room for it in host memory."""
        pinned = source.cache.pin(chain)
        source.cache.take_copies()
        num_missing = len(pinned) - self.cache.find_prefix(chain[: len(pinned)]).num_blocks
        slots = self.cache.reserve(num_missing)
        if slots is not None:
            self.cache.adopt(chain[: len(pinned)], slots)
        source.cache.unpin(pinned)

    def step(self) -> None:
        """Schedule, compute, end what is finished."""
        scheduler = self._scheduler
        schedule = scheduler.schedule()
        self.cache.take_copies()
        scheduler.complete(schedule)
        for sequence in schedule:
            if (number := self._numbers.pop(sequence, None)) is not None:
                self.num_cached_tokens += sequence.num_cached_tokens or 0
                if self._future is not None:
                    self._future.pass_by(number)
            if sequence.num_uncomputed == 0:
                sequence.append(next(self._new_tokens))
                if sequence.end() is not None:
                    scheduler.remove(sequence)
                    self.num_owned -= 1
        self.cache.take_moves()
        self.num_preemptions = scheduler.num_preemptions


def chains(workload: Workload) -> list[tuple[BlockHash, ...]]:
    """Of each request, the hashes of its prompt's full blocks."""
    return [tuple(HASHER.hash_blocks(ask.prompt)) for ask in workload.asks]


def usable(workload: Workload, hashes: Sequence[Sequence[BlockHash]]) -> list[Sequence[BlockHash]]:
    """Of each request, what it can use of them: its last token is always computed."""
    return [
        chain[: (len(ask.prompt) - 1) // BLOCK_SIZE]
        for ask, chain in zip(workload.asks, hashes, strict=True)
    ]


def replay_one(workload: Workload, group: ReplayedGroup, limits: Limits) -> int:
    """Prompt tokens that one group did not have to compute."""
    number = 0
    while number < len(workload.asks) or group.num_owned:
        while number < len(workload.asks) and group.num_owned < limits.max_num_owned:
            group.add(number, workload.asks[number])
            number += 1
        group.step()
    return group.num_cached_tokens


Route = Callable[[int, Sequence[int]], int]
"""The group for a request, out of those that have room; both by their numbers."""


def replay_routed(
    workload: Workload, groups: Sequence[ReplayedGroup], limits: Limits, route: Route
) -> int:
    """Prompt tokens that several groups did not have to compute, each request routed by `route`."""
    number = 0
    while number < len(workload.asks) or any(group.num_owned for group in groups):
        while number < len(workload.asks):
            room = [i for i, group in enumerate(groups) if group.num_owned < limits.max_num_owned]
            if not room:
                break
            groups[route(number, room)].add(number, workload.asks[number])
            number += 1
        for group in groups:
            if group.num_owned:
                group.step()
    return sum(group.num_cached_tokens for group in groups)


def replay_planned(
    workload: Workload,
    hashes: Sequence[Sequence[BlockHash]],
    groups: Sequence[ReplayedGroup],
    limits: Limits,
    read_ahead: int,
) -> int:
    """As `replay_routed`, by the scheduler's own planner.

    It sees the first `read_ahead` requests that wait, and what groups had cached after their last
    step, as the directory would tell it. What it says to fetch from another group is fetched.
    """
    by_key = {f"group-{i}:1": group for i, group in enumerate(groups)}
    planner = Planner(BatchLimits(max_tokens=1 << 30, max_requests=64, max_wait_s=0.0), BLOCK_SIZE)
    pending, number, now_s = PendingRequests(), 0, 0.0
    while number < len(workload.asks) or pending or any(group.num_owned for group in groups):
        while number < len(workload.asks) and len(pending) < read_ahead:
            pending.add(_ready(number, workload.asks[number], tuple(hashes[number])))
            number += 1
        fleet = _fleet(by_key, limits)
        cached = {
            request.request_id: {
                key: _reported(group, request.chain(CACHE_FORMAT)) for key, group in by_key.items()
            }
            for request in planner.next_up(pending, fleet, now_s)
        }
        for batch in planner.plan(pending, fleet, now_s, cached):
            for request in batch.requests:
                chosen = int(request.request_id)
                group = by_key[batch.group.key]
                group.add(chosen, workload.asks[chosen])
                if (source := batch.sources.get(request.request_id)) is not None:
                    lender = by_key[f"{source.group_id}:{source.epoch}"]
                    group.fetch(lender, request.chain(CACHE_FORMAT)[: source.num_blocks])
        for group in groups:
            if group.num_owned:
                group.step()
        now_s += STEP_S
    return sum(group.num_cached_tokens for group in groups)


def _reported(group: ReplayedGroup, chain: Sequence[BlockHash]) -> CachedPrefix:
    found = group.cache.find_prefix(chain)
    return CachedPrefix(len(found.block_ids), found.num_blocks)


def _fleet(groups: dict[str, ReplayedGroup], limits: Limits) -> FleetView:
    views = {}
    for key, group in groups.items():
        name = GroupId(key.partition(":")[0])
        status = GroupStatus(
            name,
            1,
            MODEL,
            1,
            limits.max_num_owned,
            "healthy",
            cache_format=CACHE_FORMAT,
            transfer_address=key,
        )
        views[key] = GroupView(status, group.num_owned)
    return FleetView(views)


def _ready(number: int, ask: Ask, chain: tuple[BlockHash, ...]) -> ReadyRequest:
    request_id = RequestId(str(number))
    return ReadyRequest(
        Queued(request_id, 0, "standard", f"{number}-0".encode()),
        Request(request_id, Prompt(token_ids=ask.prompt)),
        MODEL,
        ask.prompt,
        {CACHE_FORMAT: chain},
        Journaled(token_ids()),
        # One after another, and all long ago: order is all that counts.
        submitted_s=number * 1e-6 - 1e6,
        ready_s=number * 1e-6 - 1e6,
    )
