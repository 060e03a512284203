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
from wire.errors import InvalidRequest
from wire.ids import RequestId
from wire.messages import Request, Result
from wire.records import error_info
from wire.scripts import Submission

MAX_BATCH = 64
FORGET_AT_ONCE = 64
LEAVING_PATIENCE_S = 2.0
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 1.0


async def submit_many(
    queue: QueueClient,
    requests: Iterable[Request] | AsyncIterable[Request],
    *,
    max_in_flight: int,
    forget: bool,
) -> AsyncIterator[Result]:
    """See `Producer.submit_many`."""
    flight = _Flight(queue, max_in_flight)
    pump = asyncio.create_task(flight.pump(requests), name="submit_many")
    ended: list[RequestId] = []
    try:
        while (result := await flight.next_result()) is not None:
            yield result
            if forget:
                ended.append(result.request_id)
                if len(ended) >= FORGET_AT_ONCE:
                    await queue.delete(*ended)
                    ended.clear()
        await pump
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        if flight.in_flight:
            # Often left because the server is away: not to be waited for all over again.
            await queue.cancel(*flight.in_flight, patience_s=LEAVING_PATIENCE_S)
        if ended:
            await queue.delete(*ended)


class _Flight:
    """The requests between submission and result."""

    def __init__(self, queue: QueueClient, max_in_flight: int) -> None:
        self._queue = queue
        self._slots = asyncio.Semaphore(max_in_flight)
        self._to_send: asyncio.Queue[Submission | None] = asyncio.Queue(MAX_BATCH)
        # Bounded by the slots: a slot is free again when its result was taken out of here.
        self._results: asyncio.Queue[Result | None] = asyncio.Queue()
        self.in_flight: set[RequestId] = set()

    async def next_result(self) -> Result | None:
        """The next result, or None when there will be no more (or the pump has failed)."""
        result = await self._results.get()
        if result is not None:
            self.in_flight.discard(result.request_id)
            self._slots.release()
        return result

    async def pump(self, requests: Iterable[Request] | AsyncIterable[Request]) -> None:
        """Run until every request has its result."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed(requests), name="feed")
                while batch := await self._next_batch():
                    for enqueued in await self._send(batch):
                        tasks.create_task(self._await_result(enqueued))
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
                self._results.put_nowait(
                    Result(request.request_id, "failed", error=error_info(error))
                )
            else:
                await self._to_send.put(submission)
        await self._to_send.put(None)

    async def _next_batch(self) -> list[Submission]:
        """All that is there, at least one; empty when there will be no more."""
        batch: list[Submission] = []
        while not batch or not self._to_send.empty():
            submission = await self._to_send.get()
            if submission is None:
                if batch:
                    self._to_send.put_nowait(None)  # for the next call
                break
            batch.append(submission)
            if len(batch) >= MAX_BATCH:
                break
        return batch

    async def _send(self, batch: list[Submission]) -> list[Enqueued]:
        delay_s = _FIRST_DELAY_S
        self.in_flight.update(submission.request_id for submission in batch)
        accepted: list[Enqueued] = []
        while True:
            outcomes = await self._queue.enqueue(batch)
            accepted += [item for item in outcomes if item.outcome != "full"]
            batch = [
                submission
                for submission, item in zip(batch, outcomes, strict=True)
                if item.outcome == "full"
            ]
            if not batch:
                return accepted
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)

    async def _await_result(self, enqueued: Enqueued) -> None:
        self._results.put_nowait(await self._queue.wait_for(enqueued))


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
