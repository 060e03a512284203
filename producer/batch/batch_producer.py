"""The part of a producer that a batch run needs."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Protocol

from wire.errors import ForebayError
from wire.messages import Request, Result


class BatchProducer(Protocol):
    """Whatever can submit many requests."""

    def submit_many(
        self,
        requests: AsyncIterable[Request] | Iterable[Request],
        *,
        max_in_flight: int = ...,
        forget: bool = ...,
        adopt: bool = ...,
    ) -> AsyncIterator[Result]:
        """Submit all of `requests`; their results in completion order, each exactly once.

        `forget` deletes each result from the server when the next one is asked for; `adopt` also
        those of requests that an earlier run has submitted.
        """


class IdleProducer:
    """For a run that has no row left to submit: it needs no server."""

    async def submit_many(
        self,
        requests: AsyncIterable[Request] | Iterable[Request],
        *,
        max_in_flight: int = 0,
        forget: bool = False,
        adopt: bool = False,
    ) -> AsyncIterator[Result]:
        """Yield nothing. Raises ForebayError if there is a request all the same."""
        assert isinstance(requests, AsyncIterable)
        async for _ in requests:
            raise ForebayError("the input has grown since the run began; run it again")
        no_results: list[Result] = []
        for result in no_results:
            yield result
