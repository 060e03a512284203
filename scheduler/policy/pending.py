"""The requests that are ready to go, in the order in which they should.

Each class of priority gives a head start. What counts is the time of submission plus the class's
delay:

    interactive  +0 s      standard  +5 s      batch  +30 s

So an interactive request overtakes everything that came up to 5 or 30 seconds before it, and a
batch request, once it has waited that long, is overtaken by nobody: no class starves, however
much of a higher class arrives. Within a class the order is first come, first served.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from wire.ids import BlockHash, RequestId, TokenIds
from wire.messages import Priority, Request
from wire.records import Journaled
from wire.scripts import Queued

HEAD_START_S: dict[Priority, float] = {"interactive": 0.0, "standard": 5.0, "batch": 30.0}


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """A request that can be dispatched: tokenized, its model known.

    `journaled` is what an earlier attempt left; its tokens are prefilled like the prompt.
    `chains` has the hashes of the prompt's full blocks, by cache format. `submitted_s` and
    `ready_s` (since when it could be sent) are on the scheduler's clock, `deadline_ms` is on the
    server's. `num_crashes` counts the groups that died while they held it, `num_neighbours` what
    else the last of them held.
    """

    queued: Queued
    request: Request
    model: str
    prompt_token_ids: TokenIds
    chains: Mapping[str, tuple[BlockHash, ...]]
    journaled: Journaled
    submitted_s: float
    ready_s: float
    deadline_ms: int | None = None
    num_crashes: int = 0
    num_neighbours: int = 0

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.queued.request_id

    def chain(self, cache_format: str) -> tuple[BlockHash, ...]:
        """The hashes of the prompt's blocks; none in a format that came up only after it."""
        return self.chains.get(cache_format, ())

    def is_late(self, server_ms: int) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_ms is not None and self.deadline_ms <= server_ms

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute before the first new one, if nothing of them is cached."""
        return len(self.prompt_token_ids) + len(self.journaled.token_ids)


class PendingRequests:
    """A priority queue of requests, counted by class."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ReadyRequest]] = []
        self._sequence = 0
        self._counts: Counter[Priority] = Counter()

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[ReadyRequest]:
        """All that are pending, in no order."""
        return (request for _, _, request in self._heap)

    def count(self, priority: Priority) -> int:
        """How many requests of a class are pending."""
        return self._counts[priority]

    def add(self, request: ReadyRequest) -> None:
        """Put a request in its place."""
        due_s = request.submitted_s + HEAD_START_S[request.queued.priority]
        heapq.heappush(self._heap, (due_s, self._sequence, request))
        self._sequence += 1
        self._counts[request.queued.priority] += 1

    def first(self, limit: int) -> list[ReadyRequest]:
        """The first `limit` requests, in order, which stay where they are."""
        # Down the heap from its top: the next one is always below one that was found already.
        found: list[ReadyRequest] = []
        edge = [(self._heap[0], 0)] if self._heap else []
        while edge and len(found) < limit:
            (_, _, request), place = heapq.heappop(edge)
            found.append(request)
            for below in range(2 * place + 1, min(2 * place + 3, len(self._heap))):
                heapq.heappush(edge, (self._heap[below], below))
        return found

    def take(self, limit: int) -> list[ReadyRequest]:
        """Remove and return the first `limit` requests, in order."""
        taken = [heapq.heappop(self._heap)[2] for _ in range(min(limit, len(self._heap)))]
        self._counts.subtract(request.queued.priority for request in taken)
        return taken

    def give_back(self, requests: Iterable[ReadyRequest]) -> None:
        """Return what was taken and could not go; each finds its old place again."""
        for request in requests:
            self.add(request)

    def discard(self, queued: Set[Queued]) -> None:
        """Remove those of these requests that are pending."""
        self._heap = [item for item in self._heap if item[2].queued not in queued]
        heapq.heapify(self._heap)
        self._counts = Counter(request.queued.priority for request in self)

    def oldest_wait_s(self, now_s: float) -> float:
        """How long the request that is first in line has been ready, 0 when there is none."""
        return now_s - self._heap[0][2].ready_s if self._heap else 0.0
