"""A submitted request, as its producer sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

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
from wire.records import journal_entry
from wire.streams import START


class RequestHandle:
    """What `Producer.submit` returns. Valid while its producer is open.

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

        Raises ResultGone when the result outlived its time to live, ServerUnreachable when the
        server stays away.
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

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The output in order, without gap or repetition; ends when the request does.

        Chunks come as they are generated for a request submitted with `stream=True`, otherwise a
        block or more at a time. Raises as `result` does when it ends without an answer.
        """
        after, num_tokens, num_chars, state = START, 0, 0, None
        while state is None:
            for entry_id, fields in await self._queue.journal_entries(self.request_id, after):
                entry = journal_entry(entry_id, fields)
                after, state = entry_id, entry.state
                if entry.chunk is not None:
                    num_tokens = entry.chunk.offset + len(entry.chunk.token_ids)
                    num_chars += len(entry.chunk.text)
                    yield entry.chunk
        result = await self.result()
        if num_tokens < len(result.token_ids):
            # The journal of a request that does not stream is emptied when the request ends.
            yield _rest(result, num_tokens, num_chars)


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


def _rest(result: Result, num_tokens: int, num_chars: int) -> Chunk:
    """What of a result is not among its first tokens, and not in the text that came with them."""
    return Chunk(
        fence=0,
        offset=num_tokens,
        token_ids=result.token_ids[num_tokens:],
        text=result.text[num_chars:],
        logprobs=result.logprobs[num_tokens:] if result.logprobs else None,
    )
