"""A thin synchronous face of the producer, for scripts and notebooks.

An event loop in a thread of its own does the work; every call here hands it a coroutine and waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from producer.handle import RequestHandle
from producer.position import StreamPosition
from producer.producer import DEFAULT_URL, Producer
from producer.requests import Message
from wire.ids import RequestId
from wire.messages import DEFAULT_TENANT, Chunk, Priority, Request, Result
from wire.sampling import SamplingParams

Returned = TypeVar("Returned")

_CLOSING_POLL_S = 0.01


class SyncHandle:
    """A submitted request; see `RequestHandle` for what is raised."""

    def __init__(self, producer: SyncProducer, handle: RequestHandle) -> None:
        self._producer = producer
        self._handle = handle

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self._handle.request_id

    def result(self) -> Result:
        """Wait for the answer."""
        return self._producer.wait(self._handle.result())

    def cancel(self) -> None:
        """Ask for the request to be stopped."""
        self._producer.wait(self._handle.cancel())

    def __iter__(self) -> Iterator[Chunk]:
        """The output as it comes."""
        return self.stream()

    def stream(self, after: StreamPosition | None = None) -> Iterator[Chunk]:
        """The output behind `after` as it comes."""
        return self._producer.iterate(self._handle.stream(after))


class SyncProducer:
    """`with SyncProducer(url) as producer:`; takes what `Producer` takes, for one thread."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self._url = url
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="forebay_producer", daemon=True
        )
        self._producer: Producer | None = None

    def __enter__(self) -> Self:
        """Connect. Raises ServerUnreachable, ConfigError."""
        self._thread.start()
        try:
            self._producer = self.wait(self._open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections. What was submitted goes on."""
        try:
            self.wait(self._open_producer.__aexit__(exc_type, exc, traceback))
        finally:
            self._stop()

    def submit(
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
    ) -> SyncHandle:
        """See `Producer.submit`."""
        handle = self.wait(
            self._open_producer.submit(
                prompt,
                messages=messages,
                sampling=sampling,
                request_id=request_id,
                model=model,
                priority=priority,
                tenant=tenant,
                stream=stream,
                timeout_s=timeout_s,
                wait=wait,
                durable=durable,
            )
        )
        return SyncHandle(self, handle)

    def attach(self, request_id: str) -> SyncHandle:
        """See `Producer.attach`."""
        return SyncHandle(self, self._open_producer.attach(request_id))

    def submit_many(
        self,
        requests: Iterable[Request],
        *,
        max_in_flight: int = 256,
        forget: bool = False,
        adopt: bool = False,
    ) -> Iterator[Result]:
        """See `Producer.submit_many`."""
        return self.iterate(
            self._open_producer.submit_many(
                requests, max_in_flight=max_in_flight, forget=forget, adopt=adopt
            )
        )

    def wait(self, work: Coroutine[Any, Any, Returned]) -> Returned:
        """Run a coroutine of the producer's to its end."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt here must not leave the work running there
            raise

    def iterate(self, items: AsyncIterator[Returned]) -> Iterator[Returned]:
        """Step through an asynchronous iterator; left early, it is closed."""
        try:
            while True:
                try:
                    yield self.wait(_next(items))
                except StopAsyncIteration:
                    return
        finally:
            self.wait(_close(items))

    @property
    def _open_producer(self) -> Producer:
        assert self._producer is not None, "use it as `with SyncProducer(...) as producer:`"
        return self._producer

    async def _open(self) -> Producer:
        # Made inside the loop that it will live in.
        return await Producer(self._url, **self._options).__aenter__()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(items: AsyncIterator[Returned]) -> Returned:
    return await anext(items)


async def _close(items: AsyncIterator[Any]) -> None:
    # A step that was interrupted may still be cleaning up, and is not to be closed meanwhile.
    while getattr(items, "ag_running", False):
        await asyncio.sleep(_CLOSING_POLL_S)
    aclose = getattr(items, "aclose", None)
    if aclose is not None:
        await aclose()
