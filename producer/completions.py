"""Results of requests, as they end.

A producer that shares its results with nobody has a results stream of its own: one read tells of
every request that ended, however many are in flight. The end of any other request is waited for by
its journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from weakref import WeakValueDictionary

from redis.asyncio import Redis

from producer.journals import Journals
from producer.outcomes import Outcome, fetch_results
from producer.patience import Patience
from producer.reconciling import Reconciler
from producer.stream_reader import StreamReader
from wire.backoff import retry_delays
from wire.errors import ForebayError, ProducerClosed, ServerUnreachable
from wire.ids import RequestId
from wire.keys import Keys
from wire.messages import Result
from wire.streams import START, Entry


class Completions:
    """Futures for results. `results_key` is the producer's own stream, None if it has none."""

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        reader: StreamReader,
        reconciler: Reconciler,
        journals: Journals,
        results_key: str | None,
        patience: Patience,
    ) -> None:
        self._client = client
        self._patience = patience
        self._keys = keys
        self._reader = reader
        self._reconciler = reconciler
        self._journals = journals
        self._results_key = results_key
        self._upcoming: asyncio.Future[list[Entry]] | None = None
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

    async def wait_for(
        self, request_id: RequestId, expected: asyncio.Future[Result] | None
    ) -> Result:
        """The result of a request, once it has ended; `expected` if this producer is told of it.

        Raises ResultGone when the server knows nothing of the request (any more), WireError when
        its result cannot be read.
        """
        if expected is not None and not _was_away(expected):
            in_vain = asyncio.get_running_loop().create_future()
            with self._reconciler.watch(request_id, partial(_wake, in_vain)):
                await asyncio.wait((expected, in_vain), return_when=asyncio.FIRST_COMPLETED)
            if expected.done():
                return expected.result()
        return await self._by_journal(request_id)

    async def look(self, request_id: RequestId) -> Outcome:
        """What the record says at this moment."""
        [outcome] = await self._fetch([request_id])
        return outcome

    async def run(self) -> None:
        """Resolve futures as requests end, until cancelled."""
        assert self._results_key is not None
        try:
            await self._resolve_on(self._results_key)
        finally:
            self._fail(ProducerClosed("the producer was closed before the request ended"))

    def start_over(self) -> None:
        """Read the own stream from its beginning: the server was away and may have changed."""
        if self._upcoming is not None and not self._upcoming.done():
            self._upcoming.set_result([])

    async def _resolve_on(self, key: str) -> None:
        # Entries are deleted once they are dealt with. Whatever goes wrong with some of them, the
        # next read from the beginning finds them again, so none is left behind.
        self._upcoming, delays = self._reader.next_entries(key, START), retry_delays()
        while True:
            try:
                entries = await self._upcoming
                # Asked for before the results are fetched: the reader does not have to be rung.
                after = entries[-1][0] if entries else START
                self._upcoming = self._reader.next_entries(key, after)
                if entries:
                    await self._resolve(entries)
                    await self._patience.persist(partial(self._delete, key, entries))
                delays = retry_delays()
            except ServerUnreachable as error:
                self._fail(error)
                await asyncio.sleep(next(delays))
                self._upcoming.cancel()
                self._upcoming = self._reader.next_entries(key, START)

    async def _resolve(self, entries: Sequence[Entry]) -> None:
        ids = [RequestId(fields[b"request_id"].decode()) for _, fields in entries]
        wanted = [request_id for request_id in ids if request_id in self._futures]
        for request_id, outcome in zip(wanted, await self._fetch(wanted), strict=True):
            # None: an id that was submitted anew, and will end once more.
            if outcome is not None:
                _set(self._futures.pop(request_id, None), outcome)

    async def _delete(self, key: str, entries: Sequence[Entry]) -> None:
        await self._client.xdel(key, *(entry_id for entry_id, _ in entries))

    async def _fetch(self, request_ids: Sequence[RequestId]) -> list[Outcome]:
        return await self._patience.persist(
            lambda: fetch_results(self._client, self._keys, request_ids)
        )

    def _fail(self, error: ForebayError) -> None:
        for future in list(self._futures.values()):
            _set(future, error)
        self._futures.clear()

    async def _by_journal(self, request_id: RequestId) -> Result:
        """Wait for a result by the request's own journal: right for whoever sent it."""
        after = START
        while True:
            outcome = await self.look(request_id)
            if isinstance(outcome, Result):
                return outcome
            if outcome is not None:
                raise outcome
            ended = False
            while not ended:
                entries = await self._journals.next_entries(request_id, after)
                if not entries:
                    break
                after = entries[-1][0]
                ended = any(b"state" in fields for _, fields in entries)


def _was_away(expected: asyncio.Future[Result]) -> bool:
    """Whether it failed, maybe long ago, because the server was away: by now it may be back."""
    return expected.done() and isinstance(expected.exception(), ServerUnreachable)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _set(future: asyncio.Future[Result] | None, outcome: Result | BaseException) -> None:
    if future is None or future.done():
        return
    if isinstance(outcome, Result):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
        future.exception()  # whoever waits still gets it; nobody waiting is no warning
