"""Batching and routing: which requests go out now, in which batch, to which group.

Requests are routed one by one in their order, each to the group where it is expected to finish
first; those for one group make up its batch, neighbours by prefix. Expected work before a
request's first token, in tokens:

    uncached prefill of the request  +  requests that the group holds x mean tokens of a request

What is cached there is what the directory says, or what was sent there lately where that is more
(`scheduler.policy.prefix_affinity`). If another group than the chosen one has clearly more of the
prompt, and gives it out, the request is told where.

A batch closes at its limit of tokens or requests, or at the group's credits. While everything
that waits would not fill a batch, it waits for company, at most `max_wait_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.prefix_affinity import PrefixAffinity
from wire.ids import BlockHash, RequestId
from wire.messages import PrefixSource
from wire.scripts import CachedPrefix

CachedPrefixes: TypeAlias = Mapping[RequestId, Mapping[str, CachedPrefix]]
"""What the directory says that groups, by their keys, have cached of requests' prompts."""

MIN_FETCHED_BLOCKS = 4
"""For fewer blocks than this it is not worth asking another group."""

_HOST_SHARE = 0.1
_MEAN_WEIGHT = 0.05
_FIRST_MEAN_TOKENS = 256.0
_NOTHING = CachedPrefix(0, 0)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold, and how long it may wait."""

    max_tokens: int
    max_requests: int
    max_wait_s: float


@dataclass(slots=True)
class PlannedBatch:
    """Requests that go to one group together; `exclusive`: with nothing else beside them.

    `sources` has, of some requests, another group that has more of their prompt.
    """

    group: GroupView
    requests: list[ReadyRequest] = field(default_factory=list)
    sources: dict[RequestId, PrefixSource] = field(default_factory=dict)
    num_tokens: int = 0
    exclusive: bool = False

    def takes(self, request: ReadyRequest, limits: BatchLimits) -> bool:
        """Whether the request fits; the first one always does, however long it is."""
        if not self.requests:
            return True
        return (
            len(self.requests) < limits.max_requests
            and self.num_tokens + request.num_prefill_tokens <= limits.max_tokens
        )


class Planner:
    """Forms batches; remembers where prefixes went and how long requests are."""

    def __init__(self, limits: BatchLimits, block_size: int) -> None:
        self._limits = limits
        self._block_size = block_size
        self._affinity = PrefixAffinity()
        self._mean_tokens = _FIRST_MEAN_TOKENS

    def next_up(
        self, pending: PendingRequests, fleet: FleetView, now_s: float
    ) -> list[ReadyRequest]:
        """The requests that `plan` would look at now, if it matters what is cached of them."""
        room = fleet.room
        if len(fleet.groups) < 2 or not room or self._worth_waiting(pending, room, now_s):
            return []
        return pending.first(room)

    def plan(
        self,
        pending: PendingRequests,
        fleet: FleetView,
        now_s: float,
        cached: CachedPrefixes | None = None,
    ) -> list[PlannedBatch]:
        """Take out of `pending` what can go now, and count it into the groups' `num_owned`.

        All of `pending` is for one model, which every group of `fleet` serves.
        """
        room = fleet.room
        if not room or not pending or self._worth_waiting(pending, room, now_s):
            return []
        batches: dict[str, PlannedBatch] = {}
        left_over: list[ReadyRequest] = []
        for request in pending.take(room):
            placing = _Placing(request, (cached or {}).get(request.request_id, {}), now_s)
            batch = self._place(placing, batches, fleet)
            if batch is None:
                left_over.append(request)
                continue
            if source := self._source(placing, batch.group, fleet):
                batch.sources[request.request_id] = source
            batch.requests.append(request)
            batch.num_tokens += request.num_prefill_tokens
            batch.group.num_owned += 1
            self._affinity.note(
                batch.group.key,
                placing.chain(batch.group),
                placing.reported(batch.group).num_blocks,
                now_s,
            )
            self._mean_tokens += _MEAN_WEIGHT * (request.num_prefill_tokens - self._mean_tokens)
        pending.give_back(left_over)
        for batch in batches.values():
            # Stable: within a prefix, and among requests too short for one, order stays.
            cache_format = batch.group.status.cache_format
            batch.requests.sort(key=lambda request: request.chain(cache_format)[:1])
        return list(batches.values())

    def forget_group(self, key: str) -> None:
        """A group is gone, and its cache with it."""
        self._affinity.forget(key)

    def _worth_waiting(self, pending: PendingRequests, room: int, now_s: float) -> bool:
        full = min(room, self._limits.max_requests)
        return len(pending) < full and pending.oldest_wait_s(now_s) < self._limits.max_wait_s

    def _place(
        self, placing: _Placing, batches: dict[str, PlannedBatch], fleet: FleetView
    ) -> PlannedBatch | None:
        candidates = [group for group in fleet.groups.values() if group.room > 0]
        for group in sorted(candidates, key=lambda group: self._cost(placing, group)):
            batch = batches.get(group.key) or PlannedBatch(group)
            if batch.takes(placing.request, self._limits):
                batches[group.key] = batch
                return batch
        return None

    def _cost(self, placing: _Placing, group: GroupView) -> float:
        reported = placing.reported(group)
        # What comes back from host memory costs little, but what is on the device costs nothing.
        from_host = reported.num_blocks - reported.num_device_blocks
        cached = self._num_cached_blocks(placing, group) - _HOST_SHARE * from_host
        uncached = placing.request.num_prefill_tokens - cached * self._block_size
        return uncached + group.num_owned * self._mean_tokens

    def _source(
        self, placing: _Placing, chosen: GroupView, fleet: FleetView
    ) -> PrefixSource | None:
        """The group to fetch from: not by guesses, only what it has reported can be fetched."""
        enough = self._num_cached_blocks(placing, chosen) + MIN_FETCHED_BLOCKS
        sources: list[tuple[int, int, GroupView]] = []
        for key, reported in placing.cached.items():
            group = fleet.groups.get(key)
            if group is None or group is chosen or group.late or reported.num_blocks < enough:
                continue
            if group.status.transfer_address is not None:
                sources.append((reported.num_blocks, -group.num_owned, group))
        if not sources:
            return None
        num_blocks, _, group = max(sources, key=lambda source: source[:2])
        status = group.status
        assert status.transfer_address is not None
        return PrefixSource(status.group_id, status.epoch, num_blocks, status.transfer_address)

    def _num_cached_blocks(self, placing: _Placing, group: GroupView) -> int:
        return self._affinity.num_cached_blocks(
            group.key,
            placing.chain(group),
            placing.reported(group).num_blocks,
            placing.now_s,
        )


@dataclass(frozen=True, slots=True)
class _Placing:
    """A request that is being placed, and what the directory says that groups have of it."""

    request: ReadyRequest
    cached: Mapping[str, CachedPrefix]
    now_s: float

    def reported(self, group: GroupView) -> CachedPrefix:
        return self.cached.get(group.key, _NOTHING)

    def chain(self, group: GroupView) -> tuple[BlockHash, ...]:
        return self.request.chain(group.status.cache_format)
