"""The producer: submits requests to the pipeline and hands out what becomes of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from producer.completions import Completions
from producer.handle import Enqueued, RequestHandle
from producer.many import submit_many
from producer.patience import Patience
from producer.requests import Message, make_prompt, make_submission, new_request_id
from producer.stream_reader import StreamReader
from wire.client import connect, ping, redis_errors
from wire.codec import encode
from wire.errors import IntakeFull
from wire.ids import RequestId
from wire.keys import Keys, check_name, check_request_id
from wire.messages import DEFAULT_TENANT, Priority, Request, Result
from wire.records import ending
from wire.sampling import SamplingParams
from wire.scripts import Scripts, Submission, SubmitOutcome
from wire.streams import Entry

DEFAULT_URL = "redis://127.0.0.1:6379/0"
DEFAULT_NAMESPACE = "forebay"
DEFAULT_RESULT_TTL_S = 3600.0
DEFAULT_MAX_QUEUED = 100_000
DEFAULT_PATIENCE_S = 30.0

RETRY_AFTER_S = 1.0


class Producer:
    """Submits requests; use it as `async with Producer(url) as producer:`.

    `url` names the server (redis://, rediss:// or unix://). `results` names a results stream that
    consumers share; without it this producer has one of its own. `max_queued` bounds the queue
    (and the unread results); above it a submission is refused with IntakeFull. Results can be
    read for `result_ttl_s` seconds after the end. When the server goes away, calls try again for
    `patience_s` seconds, then raise ServerUnreachable.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        results: str | None = None,
        max_queued: int = DEFAULT_MAX_QUEUED,
        result_ttl_s: float = DEFAULT_RESULT_TTL_S,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        self._url = url
        self._producer_id = os.urandom(8).hex()
        self._reply_to = check_name("results", results) if results else self._producer_id
        self._max_queued = max_queued
        self._result_ttl_ms = int(result_ttl_s * 1000)
        self._patience = Patience(url, patience_s)
        self._keys = Keys(namespace)
        self._client = connect(url)
        self._blocking_client = connect(url, blocking=True)
        self._scripts = Scripts(self._client, self._keys)
        self._reader = StreamReader(
            self._client,
            self._blocking_client,
            url,
            self._keys.bell(self._producer_id),
            patience_s=patience_s,
        )
        self._completions = Completions(
            self._client,
            self._keys,
            self._reader,
            None if results else self._keys.results(self._producer_id),
            self._patience,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Check that the server answers. Raises ServerUnreachable."""
        try:
            await ping(self._client, self._url)
        except BaseException:
            await self._close_clients()
            raise
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._reader.run(), name="stream_reader"))
        if self._completions.has_own_stream:
            self._tasks.append(loop.create_task(self._completions.run(), name="completions"))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections. What was submitted goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_clients()

    async def _close_clients(self) -> None:
        await self._client.aclose()
        await self._blocking_client.aclose()

    async def submit(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        model: str | None = None,
        priority: Priority = "standard",
        tenant: str = DEFAULT_TENANT,
        stream: bool = False,
        timeout_s: float | None = None,
        wait: bool = False,
    ) -> RequestHandle:
        """Submit one request: a prompt (text or token ids) to continue, or a conversation.

        `request_id` is yours to choose: submitting the same id again returns a handle to the first
        submission. `timeout_s` ends the request as expired that long after its submission.
        `stream` has tokens written as they come. `wait` waits while the intake is full.
        Raises InvalidRequest, IntakeFull, ServerUnreachable.
        """
        submission = make_submission(
            Request(
                request_id=check_request_id(request_id) if request_id else new_request_id(),
                prompt=make_prompt(prompt, messages),
                sampling=sampling or SamplingParams(),
                model=model,
                priority=priority,
                tenant=tenant,
                stream=stream,
                timeout_s=timeout_s,
            )
        )
        while True:
            [accepted] = await self.enqueue([submission])
            if accepted.outcome != "full":
                return RequestHandle(self, accepted)
            if not wait:
                raise IntakeFull(
                    f"the queue is at its limit of {self._max_queued} requests, or as many results "
                    f"wait to be read; try again in {RETRY_AFTER_S:g} s",
                    retry_after_s=RETRY_AFTER_S,
                )
            await asyncio.sleep(RETRY_AFTER_S)

    def submit_many(
        self,
        requests: Iterable[Request] | AsyncIterable[Request],
        *,
        max_in_flight: int = 256,
        forget: bool = False,
    ) -> AsyncIterator[Result]:
        """Submit many requests and yield their results in the order in which they end.

        At most `max_in_flight` are submitted and not yet yielded, so that `requests` may be
        endless. Each result comes once, whatever its state: nothing is raised for one request
        that fails or is invalid. `forget` deletes each from the server once it was yielded, instead
        of keeping it for its time to live. Leaving the iteration early cancels what is in flight.
        """
        return submit_many(self, requests, max_in_flight=max_in_flight, forget=forget)

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

    async def cancel(self, *request_ids: RequestId) -> None:
        """Ask for requests to be stopped; those that have ended already stay as they are."""
        result = encode(ending("cancelled"))
        for request_id in request_ids:
            await self._patience.persist(partial(self._scripts.cancel, request_id, result))

    async def delete(self, *request_ids: RequestId) -> None:
        """Delete ended requests from the server, ahead of their time to live."""
        names = [self._keys.request(rid) for rid in request_ids]
        names += [self._keys.journal(rid) for rid in request_ids]
        await self._patience.persist(lambda: self._client.unlink(*names))
