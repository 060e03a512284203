"""The producers, readers and consumers of a run, who find out whether every answer is right.

Each request has one reader, who checks what it reads as it comes: no gap, nothing twice. Whoever
"hops" leaves every few chunks and goes on as another producer, from where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from chaos.questions import Question
from producer import Consumer, Producer
from producer.handle import RequestHandle
from producer.position import StreamPosition
from wire.errors import (
    ForebayError,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
    ResultGone,
    ServerUnreachable,
)
from wire.ids import RequestId
from wire.messages import Chunk, Request, Result

SHARED_RESULTS = "chaos"
PATIENCE_S = 60.0
TAKE_OVER_AFTER_S = 1.5
HOP_AFTER_CHUNKS = 4
POISONED = "worker_lost"


@dataclass(slots=True)
class Reading:
    """What one reader has read so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def position(self) -> StreamPosition:
        """Where it stands."""
        return StreamPosition(len(self.tokens), len(self.text))

    def add(self, chunk: Chunk) -> str | None:
        """Take in a chunk. Returns what is wrong with it, if anything is."""
        if (chunk.offset, chunk.text_offset) != (len(self.tokens), len(self.text)):
            return (
                f"a chunk at {chunk.offset}, {chunk.text_offset} came where {len(self.tokens)}, "
                f"{len(self.text)} was reached"
            )
        self.tokens += chunk.token_ids
        self.text += chunk.text
        return None


class Clients:
    """All of them; `violations` says what was wrong with what they got.

    `lossy`: the server may forget what it accepted within the last second. Whoever is told that
    their request is not known submits it again, as the message says.
    """

    def __init__(self, url: str, seed: int, *, lossy: bool) -> None:
        self._url = url
        self._random = random.Random(f"clients of {seed}")
        self._lossy = lossy
        self._questions: dict[RequestId, Question] = {}
        self.violations: list[str] = []
        self.results: dict[RequestId, Result] = {}
        self.forgotten: list[Result] = []
        self.deliveries: Counter[RequestId] = Counter()
        self.num_resubmitted = 0
        self.unanswered: set[RequestId] = set()

    async def run(self, questions: Sequence[Question], started_s: float) -> None:
        """Ask everything, each at its time; returns when all answers are there."""
        self._questions = {question.request_id: question for question in questions}
        self.unanswered = set(self._questions)
        async with contextlib.AsyncExitStack() as stack:
            one, other, sharing = [
                await stack.enter_async_context(
                    Producer(self._url, results=results, patience_s=PATIENCE_S)
                )
                for results in (None, None, SHARED_RESULTS)
            ]
            await stack.enter_async_context(self._consuming(2))
            async with asyncio.TaskGroup() as asking:
                bulk = [question for question in questions if question.route == "bulk"]
                asking.create_task(self._ask_in_bulk(bulk, other, started_s), name="bulk")
                for question in questions:
                    await asyncio.sleep(started_s + question.at_s - time.monotonic())
                    if question.route != "bulk":
                        own = self._random.choice((one, other))
                        producer = sharing if question.route == "shared" else own
                        asking.create_task(
                            self._ask(question, producer, other), name=question.request_id
                        )
            shared = {question.request_id for question in questions if question.route == "shared"}
            while undelivered := shared - set(self.deliveries):
                self.unanswered = undelivered
                await asyncio.sleep(0.05)
        self.unanswered = set()

    async def _ask_in_bulk(
        self, questions: Sequence[Question], producer: Producer, started_s: float
    ) -> None:
        async def requests() -> AsyncIterator[Request]:
            for question in questions:
                await asyncio.sleep(started_s + question.at_s - time.monotonic())
                yield question.request

        async for result in producer.submit_many(requests(), forget=True):
            question = self._questions[result.request_id]
            if result.request_id not in self.unanswered:
                self._complain(question, f"comes once more: {result}")
            self._check(question, result)
            self.unanswered.discard(result.request_id)
            self.forgotten.append(result)

    async def _ask(self, question: Question, producer: Producer, other: Producer) -> None:
        reading = Reading()
        while True:
            try:
                handle = await self._submit(question, producer)
                async with _cancelling(handle, question.cancel_after_s):
                    await self._read(question, handle, other, reading)
                break
            except ResultGone as error:
                if not self._lossy:
                    self._complain(question, f"is gone: {error}")
                    break
                self.num_resubmitted += 1
            except ForebayError as error:
                self._complain(question, f"{type(error).__name__}: {error}")
                break
        self.unanswered.discard(question.request_id)

    async def _submit(self, question: Question, producer: Producer) -> RequestHandle:
        request = question.request
        return await producer.submit(
            request.prompt.text,
            request_id=request.request_id,
            sampling=request.sampling,
            priority=request.priority,
            stream=request.stream,
            timeout_s=request.timeout_s,
        )

    async def _read(
        self, question: Question, handle: RequestHandle, other: Producer, reading: Reading
    ) -> None:
        if question.reading != "result":
            with contextlib.suppress(RequestCancelled, RequestExpired, RequestFailed):
                async with contextlib.aclosing(
                    self._chunks(question, handle, other, reading)
                ) as chunks:
                    async for chunk in chunks:
                        if (wrong := reading.add(chunk)) is not None:
                            self._complain(question, wrong)
                            return
        result = await handle.outcome()
        self.results[question.request_id] = result
        self._check(question, result)
        if question.reading != "result" and not self._agree(reading, result):
            self._complain(question, f"{reading} was read, but the end is {result}")

    async def _chunks(
        self, question: Question, handle: RequestHandle, other: Producer, reading: Reading
    ) -> AsyncGenerator[Chunk, None]:
        hops = question.reading == "hop"
        while True:
            num_chunks = 0
            stream = cast("AsyncGenerator[Chunk, None]", handle.stream(after=reading.position))
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield chunk
                    num_chunks += 1
                    if hops and num_chunks == HOP_AFTER_CHUNKS:
                        break
                else:
                    return
            handle = other.attach(question.request_id)

    def _agree(self, reading: Reading, result: Result) -> bool:
        tokens = list(result.token_ids)
        if self._lossy and result.state != "done":
            # Ended before what its reader had, and the server had lost, was computed again.
            return reading.tokens[: len(tokens)] == tokens and reading.text.startswith(result.text)
        return reading.tokens == tokens and reading.text == result.text

    def _check(self, question: Question, result: Result) -> None:
        took_s = (result.finished_ms - result.submitted_ms) / 1000
        timeout_s = question.request.timeout_s
        if result.state == "done":
            if result.text != question.answer:
                self._complain(question, f"{question.answer!r} was to come: {result}")
        elif not question.uncut.startswith(result.text):
            self._complain(question, f"this is not how {question.uncut!r} begins: {result}")
        elif result.state == "cancelled" and question.cancel_after_s is None:
            self._complain(question, f"was cancelled by nobody: {result}")
        elif result.state == "expired" and (timeout_s is None or took_s < timeout_s):
            self._complain(question, f"expired after {took_s} s: {result}")
        elif question.is_poison != (result.error is not None and result.error.code == POISONED):
            self._complain(question, f"is poison, or is not: {result}")
        elif result.state == "failed" and not question.is_poison:
            self._complain(question, f"failed: {result}")

    @contextlib.asynccontextmanager
    async def _consuming(self, num_consumers: int) -> AsyncIterator[None]:
        consuming = [
            asyncio.create_task(self._consume(), name="consume") for _ in range(num_consumers)
        ]
        try:
            yield
        finally:
            for task in consuming:
                task.cancel()
            for error in await asyncio.gather(*consuming, return_exceptions=True):
                if not isinstance(error, asyncio.CancelledError):
                    self.violations.append(f"a consumer ended: {error!r}")

    async def _consume(self) -> None:
        """Consume as one consumer after another: each leaves a result without an ack."""
        while True:
            # Leaving, it may find that the server is away.
            with contextlib.suppress(ServerUnreachable):
                await self._consume_some(self._random.randint(5, 15))

    async def _consume_some(self, num_deliveries: int) -> None:
        async with Consumer(
            self._url,
            results=SHARED_RESULTS,
            take_over_after_s=TAKE_OVER_AFTER_S,
            patience_s=PATIENCE_S,
        ) as consumer:
            async for delivery in consumer:
                self._check(self._questions[delivery.result.request_id], delivery.result)
                self.deliveries[delivery.result.request_id] += 1
                num_deliveries -= 1
                if not num_deliveries:
                    return
                await delivery.ack()

    def _complain(self, question: Question, wrong: str) -> None:
        self.violations.append(f"{question.request_id} ({question.reading}): {wrong}")


@contextlib.asynccontextmanager
async def _cancelling(handle: RequestHandle, after_s: float | None) -> AsyncIterator[None]:
    """Cancel a request that long after its submission."""

    async def cancel(after_s: float) -> None:
        await asyncio.sleep(after_s)
        await handle.cancel()

    task = None if after_s is None else asyncio.create_task(cancel(after_s), name="cancel")
    try:
        yield
        if task is not None:
            await task  # too late as well: it must do no harm
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
