"""Batching and routing: which requests go out now, in which batch, to which group.

Requests are routed one by one in their order, each to the group where it is expected to finish
first; those for one group make up its batch, neighbours by prefix. Expected work before a
request's first token, in tokens:

    uncached prefill of the request  +  requests that the group holds x mean tokens of a request

A batch closes at its limit of tokens or requests, or at the group's credits. While everything
that waits would not fill a batch, it waits for company, at most `max_wait_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.prefix_affinity import PrefixAffinity

_MEAN_WEIGHT = 0.05
_FIRST_MEAN_TOKENS = 256.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold, and how long it may wait."""

    max_tokens: int
    max_requests: int
    max_wait_s: float


@dataclass(slots=True)
class PlannedBatch:
    """Requests that go to one group together; `exclusive`: with nothing else beside them."""

    group: GroupView
    requests: list[ReadyRequest] = field(default_factory=list)
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

    def plan(self, pending: PendingRequests, fleet: FleetView, now_s: float) -> list[PlannedBatch]:
        """Take out of `pending` what can go now, and count it into the groups' `num_owned`.

        All of `pending` is for one model, which every group of `fleet` serves.
        """
        room = fleet.room
        if not room or not pending or self._worth_waiting(pending, room, now_s):
            return []
        batches: dict[str, PlannedBatch] = {}
        left_over: list[ReadyRequest] = []
        for request in pending.take(room):
            batch = self._place(request, batches, fleet)
            if batch is None:
                left_over.append(request)
                continue
            batch.requests.append(request)
            batch.num_tokens += request.num_prefill_tokens
            batch.group.num_owned += 1
            self._affinity.note(batch.group.key, request.block_hashes)
            self._mean_tokens += _MEAN_WEIGHT * (request.num_prefill_tokens - self._mean_tokens)
        pending.give_back(left_over)
        for batch in batches.values():
            # Stable: within a prefix, and among requests too short for one, order stays.
            batch.requests.sort(key=lambda request: request.block_hashes[:1])
        return list(batches.values())

    def forget_group(self, key: str) -> None:
        """A group is gone, and its cache with it."""
        self._affinity.forget(key)

    def _worth_waiting(self, pending: PendingRequests, room: int, now_s: float) -> bool:
        full = min(room, self._limits.max_requests)
        return len(pending) < full and pending.oldest_wait_s(now_s) < self._limits.max_wait_s

    def _place(
        self, request: ReadyRequest, batches: dict[str, PlannedBatch], fleet: FleetView
    ) -> PlannedBatch | None:
        candidates = [group for group in fleet.groups.values() if group.room > 0]
        for group in sorted(candidates, key=lambda group: self._cost(request, group)):
            batch = batches.get(group.key) or PlannedBatch(group)
            if batch.takes(request, self._limits):
                batches[group.key] = batch
                return batch
        return None

    def _cost(self, request: ReadyRequest, group: GroupView) -> float:
        cached = self._affinity.num_cached_blocks(group.key, request.block_hashes)
        uncached = request.num_prefill_tokens - cached * self._block_size
        return uncached + group.num_owned * self._mean_tokens
