"""The consumer: several processes share the results of a producer or of a named run.

    async with Consumer(url, results="nightly") as consumer:
        async for delivery in consumer:
            store(delivery.result)
            await delivery.ack()

A result goes to one consumer at a time. One that was not acknowledged by a consumer that died (or
hangs) is delivered to another after `take_over_after_s`: at least once, so storing must bear a
repetition. It is never delivered to nobody: what cannot be read comes as a failed result.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

from redis.exceptions import RedisError

from producer.outcomes import fetch_results
from producer.patience import Patience
from producer.producer import DEFAULT_NAMESPACE, DEFAULT_PATIENCE_S, DEFAULT_URL
from wire.client import connect, ping, redis_errors
from wire.errors import WireError
from wire.ids import RequestId
from wire.keys import CONSUMERS, LIVE_TTL_MS, Keys, check_name
from wire.messages import Result
from wire.records import error_info
from wire.scripts import Scripts
from wire.streams import Entry, ack_and_delete, claim_idle, ensure_group, read_group

BLOCK_MS = 1000


@dataclass(frozen=True, slots=True)
class Delivery:
    """One result on loan: acknowledge it once it is dealt with."""

    result: Result
    entry_id: bytes
    consumer: Consumer

    async def ack(self) -> None:
        """Done with it: it is delivered to nobody any more."""
        await self.consumer.ack(self)


class Consumer:
    """One member of the consumer group of a results stream; iterate over it, endlessly.

    `results` is the name that producers gave. `max_unacked` bounds how many results this consumer
    holds. When the server goes away it tries again for `patience_s`, then raises
    ServerUnreachable.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        results: str,
        namespace: str = DEFAULT_NAMESPACE,
        max_unacked: int = 64,
        take_over_after_s: float = 30.0,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        self._url = url
        self._keys = Keys(namespace)
        self._key = self._keys.results(check_name("results", results))
        self._name = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._max_unacked = max_unacked
        self._take_over_after_ms = int(take_over_after_s * 1000)
        self._patience = Patience(url, patience_s)
        self._client = connect(url)
        self._blocking_client = connect(url, blocking=True)
        self._scripts = Scripts(self._client, self._keys)
        self._held: set[bytes] = set()
        self._ready: deque[Delivery] = deque()
        self._room = asyncio.Event()
        self._keep_alive: asyncio.Task[None] | None = None
        self._next_take_over_s = 0.0

    async def __aenter__(self) -> Self:
        """Join the group. Raises ServerUnreachable."""
        try:
            await ping(self._client, self._url)
            with redis_errors(self._url):
                await ensure_group(self._client, self._key, CONSUMERS, ttl_ms=LIVE_TTL_MS)
        except BaseException:
            await self._close_clients()
            raise
        self._room.set()
        self._keep_alive = asyncio.create_task(self._keep_claims(), name="keep_claims")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave. What was not acknowledged goes to another consumer."""
        assert self._keep_alive is not None
        self._keep_alive.cancel()
        await asyncio.gather(self._keep_alive, return_exceptions=True)
        try:
            # Pending may also be what came in a reply that was never seen.
            await self._scripts.drop_consumer(self._key, CONSUMERS, self._name)
        except RedisError:
            pass  # an empty consumer that stays in the group does no harm
        finally:
            await self._close_clients()

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Deliveries as results come; an iteration that is left goes on with the next one."""
        while True:
            while self._ready:
                yield self._ready.popleft()
            await self._room.wait()
            self._ready.extend(await self._patience.persist(self._next_deliveries))

    async def ack(self, delivery: Delivery) -> None:
        """Done with a delivery. Raises ServerUnreachable; it may then be delivered again."""
        await self._patience.persist(
            partial(ack_and_delete, self._client, self._key, CONSUMERS, delivery.entry_id)
        )
        self._held.discard(delivery.entry_id)
        self._room.set()

    async def _next_deliveries(self) -> list[Delivery]:
        room = self._max_unacked - len(self._held)
        if room <= 0:
            self._room.clear()
            return []
        entries: list[Entry] = []
        if time.monotonic() >= self._next_take_over_s:
            entries = await self._take_over(room)
            self._next_take_over_s = time.monotonic() + self._take_over_after_ms / 2000
        if not entries:
            entries = await self._read(room)
        return await self._deliveries(entries)

    async def _read(self, room: int) -> list[Entry]:
        arrived = await read_group(
            self._blocking_client,
            CONSUMERS,
            self._name,
            {self._key: ">"},
            count=room,
            ttl_ms=LIVE_TTL_MS,
            block_ms=max(1, min(BLOCK_MS, self._take_over_after_ms // 2)),
        )
        return arrived.get(self._key, [])

    async def _take_over(self, room: int) -> list[Entry]:
        """Claim what others have held for too long without a sign of life."""
        entries = await claim_idle(
            self._client,
            self._key,
            CONSUMERS,
            self._name,
            min_idle_ms=self._take_over_after_ms,
            count=room,
        )
        return [entry for entry in entries if entry[0] not in self._held]

    async def _deliveries(self, entries: list[Entry]) -> list[Delivery]:
        ids = [RequestId(fields[b"request_id"].decode()) for _, fields in entries]
        deliveries, gone = [], []
        outcomes = await fetch_results(self._client, self._keys, ids)
        for (entry_id, _), request_id, outcome in zip(entries, ids, outcomes, strict=True):
            if isinstance(outcome, WireError):
                # Its record stays: a newer version may be able to read it.
                outcome = Result(request_id, "failed", error=error_info(outcome))
            if isinstance(outcome, Result):
                deliveries.append(Delivery(outcome, entry_id, self))
            else:
                gone.append(entry_id)
        if gone:
            # Their records outlived their time to live: there is nothing to deliver any more. (Or
            # the id was submitted anew, and its end will be told anew.)
            await ack_and_delete(self._client, self._key, CONSUMERS, *gone)
        # Only now: what is lost to an error before comes again, by take-over from ourselves.
        self._held.update(delivery.entry_id for delivery in deliveries)
        return deliveries

    async def _keep_claims(self) -> None:
        """Say that what is held is still being worked on, so that nobody takes it over."""
        while True:
            await asyncio.sleep(self._take_over_after_ms / 3000)
            if not self._held:
                continue
            try:
                await self._client.xclaim(
                    self._key, CONSUMERS, self._name, 0, cast("Any", list(self._held)), justid=True
                )
            except RedisError:
                continue  # the reading side reports a server that stays away

    async def _close_clients(self) -> None:
        await self._client.aclose()
        await self._blocking_client.aclose()
