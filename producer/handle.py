"""A submitted request, as its producer (or whoever attached to it) sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from producer.position import StreamPosition
from producer.queue_client import Enqueued, QueueClient
from wire.errors import (
    ForebayError,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
    ServerUnreachable,
)
from wire.ids import RequestId
from wire.messages import Chunk, Result


class RequestHandle:
    """What `Producer.submit` and `Producer.attach` return. Valid while its producer is open.

    Iterate over it for the output as it comes; await `result()` for all of it. Both can be done,
    in any order and more than once.
    """

    def __init__(self, queue: QueueClient, enqueued: Enqueued) -> None:
        self._queue = queue
        self._enqueued = enqueued
        self._result: Result | None = None

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self._enqueued.request_id

    async def outcome(self) -> Result:
        """Wait for the end, whatever it is, and return it as a value.

        Raises ResultGone when the server knows nothing of the request (any more), ServerUnreachable
        when the server stays away, WireError for a result that this version cannot read.
        """
        if self._result is None:
            try:
                self._result = await self._queue.wait_for(self._enqueued)
            except ServerUnreachable:
                # Asked again later, the journal tells.
                self._enqueued = replace(self._enqueued, result=None)
                raise
        return self._result

    async def result(self) -> Result:
        """Wait for the answer.

        Raises RequestFailed, RequestCancelled or RequestExpired when there is none, and what
        `outcome` raises.
        """
        return answer(await self.outcome())

    async def cancel(self) -> None:
        """Ask for the request to be stopped. Whether that or its end came first, `result` tells."""
        await self._queue.cancel(self.request_id)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """`stream()` from the beginning."""
        return self.stream()

    async def stream(self, after: StreamPosition | None = None) -> AsyncIterator[Chunk]:
        """The output behind `after` (default: all of it), each token and character once, in order.

        Chunks come as they are generated for a request submitted with `stream=True`, otherwise a
        block or more at a time. `StreamPosition.behind(chunk)` is where to go on later, in this
        process or another (`Producer.attach`). Raises as `result` does when the request ends
        without an answer, once all that it had generated is out. After ServerUnreachable, go on
        from the last chunk's position.
        """
        output = self._queue.output(self.request_id, after or StreamPosition())
        is_new = self._enqueued.outcome == "new"
        async with aclosing(output.journaled(is_new=is_new)) as chunks:
            async for chunk in chunks:
                yield chunk
        result = await self.outcome()
        if (rest := output.beyond_journal(result)) is not None:
            yield rest
        answer(result)


def answer(result: Result) -> Result:
    """The result itself if the request was answered. Raises the matching error otherwise."""
    if result.state == "done":
        return result
    if result.state == "cancelled":
        raise RequestCancelled(f"request {result.request_id!r} was cancelled")
    error = result.error
    message = error.message if error else "no reason was given"
    if result.state == "expired":
        raise RequestExpired(f"request {result.request_id!r}: {message}")
    raise RequestFailed(
        f"request {result.request_id!r}: {message}",
        reason=error.code if error else ForebayError.code,
    )
