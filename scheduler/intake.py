"""Reading the intake streams: each queued request reaches one scheduler, and is not lost with it.

Schedulers share the streams as one consumer group, so an entry that was read stays pending until
the request is assigned or ended. What a dead scheduler had read is taken over by the others.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import cast

import structlog
from redis.asyncio import Redis

from wire.codec import decode, encode
from wire.errors import ForebayError, RequestExpired, WireError
from wire.ids import RequestId
from wire.keys import DISPATCHERS, LIVE_TTL_MS, SCHEDULER_TTL_MS, Keys
from wire.messages import Priority, Request, TerminalState
from wire.records import Journaled, ending, read_journal
from wire.scripts import Ending, Queued, Scripts
from wire.streams import (
    START,
    Entry,
    ack_and_delete,
    claim,
    consumers_of_all,
    ensure_group,
    entries_of_all,
    read_group,
)

log = structlog.get_logger(__name__)

BLOCK_MS = 2000
SHORT_BLOCK_MS = 20
MAX_READ = 256

_RECORD_FIELDS = (
    "state",
    "request",
    "fence",
    "submitted_ms",
    "deadline_ms",
    "entry",
    "num_crashes",
    "num_neighbours",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came out of the intake; `request` is an error if it cannot be decoded.

    `journaled` is what an earlier attempt left. Times are the server's. `num_crashes` counts the
    groups that died while they held it, `num_neighbours` what else the last of them held.
    """

    queued: Queued
    request: Request | ForebayError
    submitted_ms: int
    deadline_ms: int | None
    journaled: Journaled
    num_crashes: int = 0
    num_neighbours: int = 0

    def is_late(self, server_ms: int) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_ms is not None and self.deadline_ms <= server_ms


class Intake:
    """One scheduler's view of the intake streams of a partition."""

    def __init__(self, client: Redis, blocking_client: Redis, keys: Keys) -> None:
        self._client = client
        self._blocking_client = blocking_client
        self._keys = keys
        self._scripts = Scripts(client, keys)
        self._id = os.urandom(6).hex()
        self._held: set[tuple[Priority, bytes]] = set()
        self._priority_of = {key: priority for priority, key in keys.intakes.items()}

    async def open(self) -> None:
        """Create what must be there: the streams, and the consumer group on them."""
        for key in self._keys.intakes.values():
            await ensure_group(self._client, key, DISPATCHERS, ttl_ms=LIVE_TTL_MS)
        await self.heartbeat()

    async def heartbeat(self) -> None:
        """Say that this scheduler is alive, so that nobody takes over what it has read."""
        await self._client.set(self._keys.scheduler(self._id), b"1", px=SCHEDULER_TTL_MS)

    async def close(self) -> None:
        """Leave at once what was read to the other schedulers."""
        await self._client.delete(self._keys.scheduler(self._id))

    async def read(self, room: dict[Priority, int]) -> list[Arrival]:
        """Wait for requests, up to two seconds; at most `room` of each class."""
        arrived = await read_group(
            self._blocking_client,
            DISPATCHERS,
            self._id,
            {self._keys.intakes[priority]: ">" for priority, n in room.items() if n > 0},
            count=min(MAX_READ, *(n for n in room.values() if n > 0)),
            ttl_ms=LIVE_TTL_MS,
            # One that has no room now may have some soon.
            block_ms=BLOCK_MS if all(n > 0 for n in room.values()) else SHORT_BLOCK_MS,
        )
        entries = [(self._priority_of[key], entry) for key in arrived for entry in arrived[key]]
        return await self._arrivals(entries)

    async def read_again(self) -> list[Arrival]:
        """What was delivered to this scheduler in replies that it never saw."""
        entries: list[tuple[Priority, Entry]] = []
        for priority, key in self._keys.intakes.items():
            last = START
            while True:
                arrived = await read_group(
                    self._client,
                    DISPATCHERS,
                    self._id,
                    {key: last},
                    count=MAX_READ,
                    ttl_ms=LIVE_TTL_MS,
                )
                page = arrived.get(key, [])
                if not page:
                    break
                last = page[-1][0]
                entries += [(priority, entry) for entry in page]
        return await self._arrivals(entries)

    async def take_over(self, room: dict[Priority, int]) -> AsyncIterator[list[Arrival]]:
        """Claim what dead schedulers have read and not dispatched, some of it at a time.

        At most `room` of each class, from each of them.
        """
        intakes = {
            priority: key for priority, key in self._keys.intakes.items() if room[priority] > 0
        }
        found = await consumers_of_all(self._client, [*intakes.values()], DISPATCHERS)
        for (priority, key), readers in zip(intakes.items(), found, strict=True):
            for name, num_pending in readers.items():
                if name == self._id or await self._client.exists(self._keys.scheduler(name)):
                    continue
                if num_pending:
                    count = min(MAX_READ, room[priority])
                    yield await self._claim_from(name, priority, key, count)
                else:
                    await self._scripts.drop_consumer(key, DISPATCHERS, name)

    async def end(self, queued: Queued, state: TerminalState, error: ForebayError) -> None:
        """End a request that reaches no group."""
        log.info("request ended in the queue", request_id=queued.request_id, reason=error.code)
        # What breaks the wire format is nobody's bad request: it is kept to be looked into.
        dead = error.code if isinstance(error, WireError) else ""
        result = encode(ending(state, error))
        await self._scripts.reject([Ending(queued, state, result, dead)])
        self.settle(queued)

    async def end_late(self, queued: Queued) -> None:
        """End a request whose deadline passed before it reached a group."""
        expired = RequestExpired("the deadline passed while the request was queued")
        await self.end(queued, "expired", expired)

    def settle(self, queued: Queued) -> None:
        """Forget an entry: its request was assigned or ended, and the entry deleted with that."""
        self._held.discard((queued.priority, queued.entry_id))

    async def _claim_from(
        self, name: str, priority: Priority, key: str, count: int
    ) -> list[Arrival]:
        pending = await self._client.xpending_range(
            key, DISPATCHERS, "-", "+", count, consumername=name
        )
        entry_ids = [cast("bytes", item["message_id"]) for item in pending]
        if not entry_ids:
            return []  # another scheduler was faster
        # A minimal idle time would not protect anybody: its owner is dead, and of two schedulers
        # that claim the same entry only one finds the request's fencing token unchanged.
        claimed = await claim(self._client, key, DISPATCHERS, self._id, entry_ids)
        log.info("took over requests", from_scheduler=name, num_requests=len(claimed))
        return await self._arrivals([(priority, entry) for entry in claimed])

    async def _arrivals(self, entries: Sequence[tuple[Priority, Entry]]) -> list[Arrival]:
        """Fetch the records behind intake entries; drop entries that no queued request needs."""
        # A server that has lost its last moments delivers again what it had delivered in them.
        entries = [item for item in entries if (item[0], item[1][0]) not in self._held]
        if not entries:
            return []
        ids = [
            RequestId(fields.get(b"request_id", b"").decode(errors="replace"))
            for _, (_, fields) in entries
        ]
        async with self._client.pipeline(transaction=False) as pipe:
            for request_id in ids:
                pipe.hmget(self._keys.request(request_id), *_RECORD_FIELDS)
            records = await pipe.execute()
        journals = await self._journals(
            [rid for rid, record in zip(ids, records, strict=True) if int(record[2] or 0)]
        )
        arrivals = []
        for (priority, (entry_id, _)), request_id, record in zip(
            entries, ids, records, strict=True
        ):
            state, message, fence, submitted_ms, deadline_ms, entry, *crashes = record
            if state != b"queued" or entry != entry_id:
                key = self._keys.intakes[priority]
                await ack_and_delete(self._client, key, DISPATCHERS, entry_id)
                continue
            queued = Queued(request_id, int(fence), priority, entry_id)
            request = _decode_request(message or b"", int(submitted_ms))
            journaled = journals.get(request_id, Journaled())
            if isinstance(journaled, ForebayError):
                request, journaled = journaled, Journaled()
            arrivals.append(
                Arrival(
                    queued,
                    request,
                    int(submitted_ms),
                    int(deadline_ms) if deadline_ms else None,
                    journaled,
                    *(int(count or 0) for count in crashes),
                )
            )
        # Only now: what is lost to an error on the way here must be read again.
        self._held.update(
            (arrival.queued.priority, arrival.queued.entry_id) for arrival in arrivals
        )
        return arrivals

    async def _journals(
        self, request_ids: Sequence[RequestId]
    ) -> dict[RequestId, Journaled | ForebayError]:
        """What earlier attempts at these requests have left."""
        if not request_ids:
            return {}
        keys = [self._keys.journal(request_id) for request_id in request_ids]
        found = await entries_of_all(self._client, keys)
        return {
            request_id: _journaled(journal)
            for request_id, journal in zip(request_ids, found, strict=True)
        }


def _journaled(journal: Sequence[Entry]) -> Journaled | ForebayError:
    try:
        return read_journal(journal)
    except ForebayError as error:
        return error


def _decode_request(message: bytes, submitted_ms: int) -> Request | ForebayError:
    try:
        request = decode(Request, message)
    except ForebayError as error:
        return error
    if request.sampling.seed is not None:
        return request
    # Every attempt must draw what the one before would have drawn next.
    name = f"{request.request_id}:{submitted_ms}".encode()
    seed = int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)
    return replace(request, sampling=replace(request.sampling, seed=seed))
