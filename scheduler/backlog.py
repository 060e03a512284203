"""The requests that one scheduler holds, between the intake and the groups.

    arrived (as they were read) -> pending, or suspects (tokenized, by model) -> gone

All of it belongs to the scheduler's event loop; the events wake the loops that work on it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Sequence, Set

from scheduler.intake import Arrival
from scheduler.policy.bisecting import is_suspect
from scheduler.policy.pending import PendingRequests, ReadyRequest
from wire.messages import PRIORITIES, Priority
from wire.scripts import Queued


class Backlog:
    """What has arrived, and what is pending for each model."""

    def __init__(self) -> None:
        self.arrived: deque[Arrival] = deque()
        self.pending: dict[str, PendingRequests] = defaultdict(PendingRequests)
        self.suspects: dict[str, PendingRequests] = defaultdict(PendingRequests)
        self.to_prepare = asyncio.Event()
        self.to_dispatch = asyncio.Event()
        self.closing = False

    def __len__(self) -> int:
        return len(self.arrived) + self.num_pending

    @property
    def num_pending(self) -> int:
        """How many requests are ready to be sent."""
        return sum(map(len, self._queues()))

    def room(self, window: int) -> dict[Priority, int]:
        """How many more of each class may be read, if `window` of it are held at most."""
        room = dict.fromkeys(PRIORITIES, window)
        for arrival in self.arrived:
            room[arrival.queued.priority] -= 1
        for queue in self._queues():
            for priority in PRIORITIES:
                room[priority] -= queue.count(priority)
        return room

    def close(self) -> None:
        """Let the loops that work on it come to their end; what is held stays queued."""
        self.closing = True
        self.to_prepare.set()
        self.to_dispatch.set()

    def arrive(self, arrivals: Sequence[Arrival]) -> None:
        """Take in what was read."""
        if arrivals:
            self.arrived.extend(arrivals)
            self.to_prepare.set()

    def late(self, server_ms: int) -> set[Queued]:
        """Those whose deadline has passed."""
        waiting: list[Arrival | ReadyRequest] = [*self.arrived]
        for queue in self._queues():
            waiting += queue
        return {item.queued for item in waiting if item.is_late(server_ms)}

    def discard(self, queued: Set[Queued]) -> None:
        """Forget those of these requests that are still held."""
        self.arrived = deque(item for item in self.arrived if item.queued not in queued)
        for queue in self._queues():
            queue.discard(queued)

    def ready(self, request: ReadyRequest) -> None:
        """Take in what can be sent."""
        self.queue_of(request).add(request)

    def queue_of(self, request: ReadyRequest) -> PendingRequests:
        """Where a request waits."""
        queues = self.suspects if is_suspect(request) else self.pending
        return queues[request.model]

    def _queues(self) -> list[PendingRequests]:
        return [*self.pending.values(), *self.suspects.values()]
