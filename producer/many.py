"""Submitting an iterable of requests, bounded in flight, results as they end.

    requests -> feed (a slot for each) -> [batch] -> enqueue -> wait for each -> [results] -> yield

While one batch is on its way to the server the next one gathers: the more there is to send, the
larger the batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable

from producer.queue_client import Enqueued, QueueClient
from producer.requests import make_submission
from wire.backoff import retry_delays
from wire.errors import ForebayError, InvalidRequest, ResultGone, WireError
from wire.ids import RequestId
from wire.messages import Request, Result
from wire.records import error_info
from wire.scripts import Submission

MAX_BATCH = 64
MAX_BATCH_BYTES = 1 << 20
"""A batch is one command: it must get through before the connection counts as dead."""

MAX_SUBMISSIONS = 5
"""How often a request is submitted that the server loses again and again."""

FORGET_AT_ONCE = 64
LEAVING_PATIENCE_S = 2.0
_MAX_DELAY_S = 1.0


async def submit_many(
    queue: QueueClient,
    requests: Iterable[Request] | AsyncIterable[Request],
    *,
    max_in_flight: int,
    forget: bool,
    adopt: bool,
) -> AsyncIterator[Result]:
    """See `Producer.submit_many`."""
    flight = _Flight(queue, max_in_flight, adopt=adopt)
    pump = asyncio.create_task(flight.pump(requests), name="submit_many")
    ended: list[RequestId] = []
    try:
        while (result := await flight.next_result()) is not None:
            is_ours = flight.land(result.request_id)
            yield result
            if forget and is_ours:
                ended.append(result.request_id)
                if len(ended) >= FORGET_AT_ONCE:
                    await queue.delete(*ended)
                    ended.clear()
        await pump
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        if flight.ours:
            # Often left because the server is away: not to be waited for all over again.
            await queue.cancel(*flight.ours, patience_s=LEAVING_PATIENCE_S)
        if ended:
            await queue.delete(*ended)


class _Flight:
    """The requests between submission and result."""

    def __init__(self, queue: QueueClient, max_in_flight: int, *, adopt: bool) -> None:
        self._queue = queue
        self._adopt = adopt
        self._slots = asyncio.Semaphore(max_in_flight)
        self._to_send: asyncio.Queue[Submission | None] = asyncio.Queue(MAX_BATCH)
        # Bounded by the slots: a slot is free again when its result was taken out of here.
        self._results: asyncio.Queue[Result | None] = asyncio.Queue()
        # In flight, and not known to be somebody else's.
        self.ours: set[RequestId] = set()

    async def next_result(self) -> Result | None:
        """The next result, or None when there will be no more (or the pump has failed)."""
        return await self._results.get()

    def land(self, request_id: RequestId) -> bool:
        """Make room for another request; returns whether this one is ours to delete."""
        self._slots.release()
        is_ours = request_id in self.ours
        self.ours.discard(request_id)
        return is_ours

    async def pump(self, requests: Iterable[Request] | AsyncIterable[Request]) -> None:
        """Run until every request has its result."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed(requests), name="feed")
                while batch := await self._next_batch():
                    for submission, enqueued in await self._send(batch):
                        tasks.create_task(self._await_result(submission, enqueued))
        except BaseExceptionGroup as group:
            # All have one cause, the server or the source of requests: report it as it is.
            raise group.exceptions[0] from None
        finally:
            self._results.put_nowait(None)

    async def _feed(self, requests: Iterable[Request] | AsyncIterable[Request]) -> None:
        async for request in _as_async(requests):
            await self._slots.acquire()
            try:
                submission = make_submission(request)
            except InvalidRequest as error:
                self._results.put_nowait(_failed(request.request_id, error))
            else:
                await self._to_send.put(submission)
        await self._to_send.put(None)

    async def _next_batch(self) -> list[Submission]:
        """All that is there, at least one; empty when there will be no more."""
        batch: list[Submission] = []
        num_bytes = 0
        while not batch or not self._to_send.empty():
            submission = await self._to_send.get()
            if submission is None:
                if batch:
                    self._to_send.put_nowait(None)  # for the next call
                break
            batch.append(submission)
            num_bytes += len(submission.message)
            if len(batch) >= MAX_BATCH or num_bytes >= MAX_BATCH_BYTES:
                break
        return batch

    async def _send(self, batch: list[Submission]) -> list[tuple[Submission, Enqueued]]:
        self.ours.update(submission.request_id for submission in batch)
        accepted: list[tuple[Submission, Enqueued]] = []
        for delay_s in retry_delays(max_s=_MAX_DELAY_S):
            outcomes = await self._queue.enqueue(batch)
            refused = []
            for submission, enqueued in zip(batch, outcomes, strict=True):
                if enqueued.outcome == "full":
                    refused.append(submission)
                    continue
                accepted.append((submission, enqueued))
                if not (enqueued.is_ours or self._adopt):
                    self.ours.discard(submission.request_id)
            if not refused:
                break
            batch = refused
            await asyncio.sleep(delay_s)
        return accepted

    async def _await_result(self, submission: Submission, enqueued: Enqueued) -> None:
        self._results.put_nowait(await self._result(submission, enqueued))

    async def _result(self, submission: Submission, enqueued: Enqueued) -> Result:
        """The one result of a request, whatever happens to it."""
        num_submissions = 1
        while True:
            try:
                return await self._queue.wait_for(enqueued)
            except ResultGone as error:
                if num_submissions == MAX_SUBMISSIONS:
                    return _failed(submission.request_id, error)
            except WireError as error:
                self.ours.discard(submission.request_id)  # kept, for a version that can read it
                return _failed(submission.request_id, error)
            num_submissions += 1
            [(_, enqueued)] = await self._send([submission])


def _failed(request_id: RequestId, error: ForebayError) -> Result:
    return Result(request_id, "failed", error=error_info(error))


async def _as_async(
    requests: Iterable[Request] | AsyncIterable[Request],
) -> AsyncIterator[Request]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
            await asyncio.sleep(0)  # a long iterable must not keep the results waiting
