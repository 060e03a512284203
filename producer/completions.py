"""Results of the requests of one producer, as they end.

A producer that shares its results with nobody has a results stream of its own: one read tells of
every request that ended, however many are in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from weakref import WeakValueDictionary

from redis.asyncio import Redis

from producer.patience import Patience
from producer.stream_reader import StreamReader
from wire.errors import ForebayError, ProducerClosed, ResultGone, ServerUnreachable
from wire.ids import RequestId
from wire.keys import Keys
from wire.messages import Result
from wire.records import RESULT_FIELDS, journal_entry, result_from_record
from wire.streams import START, Entry


class Completions:
    """Futures for results. `results_key` is the producer's own stream, None if it has none."""

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        reader: StreamReader,
        results_key: str | None,
        patience: Patience,
    ) -> None:
        self._client = client
        self._patience = patience
        self._keys = keys
        self._reader = reader
        self._results_key = results_key
        self._futures: WeakValueDictionary[RequestId, asyncio.Future[Result]] = (
            WeakValueDictionary()
        )

    @property
    def has_own_stream(self) -> bool:
        """Whether this producer hears of its own requests' ends all by itself."""
        return self._results_key is not None

    def expect(self, request_id: RequestId) -> asyncio.Future[Result]:
        """A future for the result of a request that is about to be submitted.

        Only weakly held: a request that nobody waits for costs nothing here.
        """
        future = self._futures.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._futures[request_id] = future
        return future

    async def run(self) -> None:
        """Resolve futures as requests end, until cancelled."""
        try:
            await self._resolve_on()
        finally:
            self._fail(ProducerClosed("the producer was closed before the request ended"))

    async def _resolve_on(self) -> None:
        assert self._results_key is not None
        upcoming = self._reader.next_entries(self._results_key, START)
        while True:
            try:
                entries = await upcoming
            except ServerUnreachable as error:
                self._fail(error)
                upcoming = self._reader.next_entries(self._results_key, START)
                continue
            # Asked for before the results are fetched: the reader does not have to be rung.
            upcoming = self._reader.next_entries(self._results_key, entries[-1][0])
            await self._resolve(entries)

    async def _resolve(self, entries: Sequence[Entry]) -> None:
        ids = [RequestId(fields[b"request_id"].decode()) for _, fields in entries]
        wanted = [request_id for request_id in ids if request_id in self._futures]
        key, entry_ids = self._results_key, [entry_id for entry_id, _ in entries]
        assert key is not None
        try:
            results = await self._fetch(wanted)
            for request_id, outcome in zip(wanted, results, strict=True):
                _set(self._futures.pop(request_id, None), outcome)
            await self._patience.persist(lambda: self._client.xdel(key, *entry_ids))
        except ForebayError as error:
            for request_id in wanted:
                _set(self._futures.pop(request_id, None), error)

    async def _fetch(self, request_ids: Sequence[RequestId]) -> list[Result | ResultGone]:
        return await self._patience.persist(
            lambda: fetch_results(self._client, self._keys, request_ids)
        )

    def _fail(self, error: ForebayError) -> None:
        for future in list(self._futures.values()):
            _set(future, error)
        self._futures.clear()

    async def by_journal(self, request_id: RequestId) -> Result:
        """Wait for a result by the request's own journal: right for whoever sent it."""
        after = START
        while True:
            [outcome] = await self._fetch([request_id])
            if isinstance(outcome, Result):
                return outcome
            record = self._keys.request(request_id)
            if not await self._patience.persist(partial(self._client.exists, record)):
                raise outcome
            ended = False
            while not ended:
                entries = await self._reader.next_entries(self._keys.journal(request_id), after)
                after = entries[-1][0]
                ended = any(
                    journal_entry(entry_id, fields).state is not None
                    for entry_id, fields in entries
                )


def _set(future: asyncio.Future[Result] | None, outcome: Result | BaseException) -> None:
    if future is None or future.done():
        return
    if isinstance(outcome, Result):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
        future.exception()  # whoever waits still gets it; nobody waiting is no warning


async def fetch_results(
    client: Redis, keys: Keys, request_ids: Sequence[RequestId]
) -> list[Result | ResultGone]:
    """The results of requests that ended; ResultGone for one that is unknown or goes on."""
    if not request_ids:
        return []
    async with client.pipeline(transaction=False) as pipe:
        for request_id in request_ids:
            pipe.hmget(keys.request(request_id), *RESULT_FIELDS)
        records = await pipe.execute()
    return [
        result_from_record(request_id, record)
        or ResultGone(
            f"request {request_id!r} is not known: it was never submitted, or its result was kept "
            "for its time (FOREBAY_RESULT_TTL_S) and is gone"
        )
        for request_id, record in zip(request_ids, records, strict=True)
    ]
