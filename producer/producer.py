"""The producer: submits requests to the pipeline and hands out what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Self

from producer.handle import RequestHandle
from producer.many import submit_many
from producer.queue_client import Enqueued, QueueClient
from producer.requests import Message, make_prompt, make_submission, new_request_id
from wire.backoff import retry_delays
from wire.errors import IntakeFull
from wire.keys import Keys, check_name, check_request_id
from wire.messages import DEFAULT_TENANT, Priority, Request, Result
from wire.sampling import SamplingParams

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
        self._max_queued = max_queued
        self._queue = QueueClient(
            url,
            Keys(namespace),
            results=check_name("results", results) if results else None,
            max_queued=max_queued,
            result_ttl_ms=int(result_ttl_s * 1000),
            patience_s=patience_s,
        )

    async def __aenter__(self) -> Self:
        """Check that the server answers. Raises ServerUnreachable."""
        await self._queue.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections. What was submitted goes on."""
        await self._queue.close()

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
        durable: bool = False,
    ) -> RequestHandle:
        """Submit one request: a prompt (text or token ids) to continue, or a conversation.

        `request_id` is yours to choose: submitting the same id again returns a handle to the first
        submission. `timeout_s` ends the request as expired that long after its submission.
        `stream` has tokens written as they come. `wait` waits while the intake is full.

        `durable` returns only once the request is on the server's disk, in its append-only file:
        not even a crash of its machine loses it then. With `appendfsync everysec` that takes up to
        two seconds (five on Redis 7.0), however many wait at the same time. Without it, a request
        may be lost that the server accepted within the second before it crashed; whoever waits for
        it gets ResultGone, and can submit it again. (It is not submitted again by itself: what of
        it was read already could not be continued, nor its deadline kept.)

        Raises InvalidRequest, IntakeFull, ServerUnreachable (with `durable` also when the request
        is submitted, but its being on disk could not be confirmed), and ConfigError for a `durable`
        that the server cannot give: then nothing was submitted.
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
        if durable:
            await self._queue.durability.check()
        for delay_s in retry_delays(RETRY_AFTER_S, RETRY_AFTER_S):
            [accepted] = await self._queue.enqueue([submission])
            if accepted.outcome != "full":
                if not durable or await self._queue.durability.confirm(submission.request_id):
                    break
                continue  # the server restarted without it
            if not wait:
                raise IntakeFull(
                    f"the queue is at its limit of {self._max_queued} requests, or as many results "
                    f"wait to be read; try again in {RETRY_AFTER_S:g} s",
                    retry_after_s=RETRY_AFTER_S,
                )
            await asyncio.sleep(delay_s)
        return RequestHandle(self._queue, accepted)

    def attach(self, request_id: str) -> RequestHandle:
        """A handle to a request that was submitted before, by whomever.

        For a process that comes back: `stream(after=...)` goes on where it was. Nothing is asked
        of the server yet; if it does not know the request, waiting for it raises ResultGone.
        Raises InvalidRequest for what can be no id.
        """
        return RequestHandle(self._queue, Enqueued(check_request_id(request_id), "known"))

    def submit_many(
        self,
        requests: Iterable[Request] | AsyncIterable[Request],
        *,
        max_in_flight: int = 256,
        forget: bool = False,
        adopt: bool = False,
    ) -> AsyncIterator[Result]:
        """Submit many requests and yield their results in the order in which they end.

        At most `max_in_flight` are submitted and not yet yielded, so that `requests` may be
        endless. Each result comes once, whatever its state: nothing is raised for one request
        that fails or is invalid. A request that the server has lost (it was flushed, or crashed
        within a second of accepting it) is submitted again. `forget` deletes each from the server
        once it was yielded, instead of keeping it for its time to live. Leaving the iteration early
        cancels what is in flight. Neither touches a request that somebody else has submitted
        before under the same id: that one is only waited for; unless `adopt` says that all these
        ids are the caller's own, from an earlier life.
        """
        return submit_many(
            self._queue, requests, max_in_flight=max_in_flight, forget=forget, adopt=adopt
        )
