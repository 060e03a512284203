"""What producers and their handles do with the server: enqueue, wait, read, cancel, delete."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from producer.completions import Completions
from producer.durability import Durability
from producer.journals import Journals
from producer.output_stream import OutputStream
from producer.patience import Patience
from producer.position import StreamPosition
from producer.reconciling import Reconciler
from producer.stream_reader import StreamReader
from wire.client import connect, ping, redis_errors
from wire.codec import encode
from wire.ids import RequestId
from wire.keys import Keys
from wire.messages import Result
from wire.records import TERMINAL_STATES, ending
from wire.scripts import Scripts, Submission, SubmitOutcome


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of a submission.

    `is_ours`: this producer is the one whose submission counts, so that it may end the request and
    delete it. `result` is set where it hears of the end by its own results stream.
    """

    request_id: RequestId
    outcome: SubmitOutcome
    is_ours: bool = False
    result: asyncio.Future[Result] | None = None


class QueueClient:
    """One producer's connections to the queue; `results` as for `Producer`."""

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        results: str | None,
        max_queued: int,
        result_ttl_ms: int,
        patience_s: float,
    ) -> None:
        self._url = url
        self._keys = keys
        producer_id = os.urandom(8).hex()
        self._reply_to = results or producer_id
        self._max_queued = max_queued
        self._result_ttl_ms = result_ttl_ms
        self._patience = Patience(url, patience_s)
        self._client = connect(url)
        self._blocking_client = connect(url, blocking=True)
        self._scripts = Scripts(self._client, keys)
        self._reconciler = Reconciler(self._client, keys)
        self._reader = StreamReader(
            self._client,
            self._blocking_client,
            url,
            keys.bell(producer_id),
            patience_s=patience_s,
            on_return=self._on_return,
        )
        self._journals = Journals(self._reader, self._reconciler, keys)
        self._completions = Completions(
            self._client,
            keys,
            self._reader,
            self._reconciler,
            self._journals,
            None if results else keys.results(producer_id),
            self._patience,
        )
        self.durability = Durability(self._client, keys, self._patience, patience_s=patience_s)
        self._tasks: list[asyncio.Task[None]] = []

    def _on_return(self) -> None:
        self._completions.start_over()
        self._reconciler.hurry()

    async def open(self) -> None:
        """Check that the server answers, and begin to listen. Raises ServerUnreachable."""
        try:
            await ping(self._client, self._url)
        except BaseException:
            await self._close_connections()
            raise
        self._tasks.append(asyncio.create_task(self._reader.run(), name="stream_reader"))
        self._tasks.append(asyncio.create_task(self._reconciler.run(), name="reconciler"))
        if self._completions.has_own_stream:
            self._tasks.append(asyncio.create_task(self._completions.run(), name="completions"))

    async def close(self) -> None:
        """Close the connections; whoever waits gets ProducerClosed."""
        await self.durability.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_connections()

    async def _close_connections(self) -> None:
        await self._client.aclose()
        await self._blocking_client.aclose()

    async def enqueue(self, submissions: Sequence[Submission]) -> list[Enqueued]:
        """Submit in one round trip: for each, whether it is new, known already, or refused."""
        # Registered first: a result may be there before the submission's reply is.
        futures = [self._completions.expect(item.request_id) for item in submissions]

        async def call() -> list[SubmitOutcome]:
            return await self._scripts.submit(
                submissions,
                reply_to=self._reply_to,
                result_ttl_ms=self._result_ttl_ms,
                max_queued=self._max_queued,
                max_unread=self._max_queued,
            )

        outcomes = await self._patience.persist(call)
        known = [
            item.request_id
            for item, outcome in zip(submissions, outcomes, strict=True)
            if outcome == "known"
        ]
        resumed = await self._resumed(known) if known else {}
        return [
            Enqueued(
                item.request_id,
                outcome,
                is_ours=outcome == "new" or item.request_id in resumed,
                result=future
                if self._completions.has_own_stream
                and (outcome == "new" or resumed.get(item.request_id))
                else None,
            )
            for item, outcome, future in zip(submissions, outcomes, futures, strict=True)
        ]

    async def _resumed(self, known: Sequence[RequestId]) -> dict[RequestId, bool]:
        """Which known requests this producer has submitted itself, and whether they go on.

        It is so where only the reply to a first try was lost. The end of somebody else's request
        is told elsewhere, and one that was told is not told again: their journals know.
        """
        if not self._completions.has_own_stream:
            return {}

        async def look_up() -> list[tuple[bytes | None, bytes | None]]:
            async with self._client.pipeline(transaction=False) as pipe:
                for request_id in known:
                    pipe.hmget(self._keys.request(request_id), "reply_to", "state")
                return [(reply_to, state) for reply_to, state in await pipe.execute()]

        return {
            request_id: (state or b"").decode() not in TERMINAL_STATES
            for request_id, (reply_to, state) in zip(
                known, await self._patience.persist(look_up), strict=True
            )
            if reply_to == self._reply_to.encode()
        }

    async def wait_for(self, enqueued: Enqueued) -> Result:
        """The result of a request, once it has ended. Raises as `Completions.wait_for` does."""
        with redis_errors(self._url):
            return await self._completions.wait_for(enqueued.request_id, enqueued.result)

    def output(self, request_id: RequestId, position: StreamPosition) -> OutputStream:
        """A reader of a request's output who has read up to `position`."""
        return OutputStream(self._journals, self._completions, request_id, position)

    async def cancel(self, *request_ids: RequestId, patience_s: float | None = None) -> None:
        """Ask for requests to be stopped; those that have ended already stay as they are.

        `patience_s` stands in for the producer's own patience with a server that is away.
        """
        patience = self._patience if patience_s is None else Patience(self._url, patience_s)
        result = encode(ending("cancelled"))
        for request_id in request_ids:
            await patience.persist(partial(self._scripts.cancel, request_id, result))

    async def delete(self, *request_ids: RequestId) -> None:
        """Delete ended requests from the server, ahead of their time to live."""
        names = [self._keys.request(rid) for rid in request_ids]
        names += [self._keys.journal(rid) for rid in request_ids]
        await self._patience.persist(lambda: self._client.unlink(*names))
