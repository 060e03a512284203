"""What producers and their handles do with the server: enqueue, wait, read, cancel, delete."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from producer.completions import Completions
from producer.patience import Patience
from producer.stream_reader import StreamReader
from wire.client import connect, ping, redis_errors
from wire.codec import encode
from wire.ids import RequestId
from wire.keys import Keys
from wire.messages import Result
from wire.records import ending
from wire.scripts import Scripts, Submission, SubmitOutcome
from wire.streams import Entry


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of a submission; `result` is set where the producer hears of the end itself."""

    request_id: RequestId
    outcome: SubmitOutcome
    result: asyncio.Future[Result] | None


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
        self._reader = StreamReader(
            self._client,
            self._blocking_client,
            url,
            keys.bell(producer_id),
            patience_s=patience_s,
        )
        self._completions = Completions(
            self._client,
            keys,
            self._reader,
            None if results else keys.results(producer_id),
            self._patience,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Check that the server answers, and begin to listen. Raises ServerUnreachable."""
        try:
            await ping(self._client, self._url)
        except BaseException:
            await self._close_connections()
            raise
        self._tasks.append(asyncio.create_task(self._reader.run(), name="stream_reader"))
        if self._completions.has_own_stream:
            self._tasks.append(asyncio.create_task(self._completions.run(), name="completions"))

    async def close(self) -> None:
        """Close the connections; whoever waits gets ProducerClosed."""
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
        return [
            Enqueued(
                item.request_id,
                outcome,
                # Known: its end is told elsewhere, or was told long ago; the journal knows. (It
                # looks like that, too, when only the reply to a first try was lost.)
                future if outcome == "new" and self._completions.has_own_stream else None,
            )
            for item, outcome, future in zip(submissions, outcomes, futures, strict=True)
        ]

    async def wait_for(self, enqueued: Enqueued) -> Result:
        """The result of a request, once it has ended."""
        with redis_errors(self._url):
            if enqueued.result is None:
                return await self._completions.by_journal(enqueued.request_id)
            return await asyncio.shield(enqueued.result)

    async def journal_entries(self, request_id: RequestId, after: bytes) -> list[Entry]:
        """The next entries of a request's journal behind the id `after`, at least one."""
        return await self._reader.next_entries(self._keys.journal(request_id), after)

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
