"""What the five processes of a run do: our services as they are, and users as they should be.

    producer   submits the job, singly and in bulk; started again, it submits it again
    scheduler  the service
    worker     the service, with its ranks in the same event loop
    consumer   stores the results that it is sent, acknowledges each when it is stored
    reader     follows streams and stores their chunks; started again, it goes on behind the last

Each program gets the URL that makes its connections its own (`support.fault_injection`), and is
started again after its death, or when the server was not reachable at the start.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import redis.utils

import gpu_worker.service
import scheduler.intake
import scheduler.service
from crash_points.job import BLOCK_SIZE, NUM_REQUESTS, Task, make_job
from crash_points.ranks import Attempts, open_in_process_ranks, worker_of_context
from producer import Consumer, Producer, RequestHandle
from producer.position import StreamPosition
from service.settings import SchedulerSettings, WorkerSettings
from support.fault_injection import FaultyProcess
from wire.errors import ResultGone
from wire.ids import RequestId
from wire.messages import Chunk, Result

RESULTS = "shared"
TAKE_OVER_AFTER_S = 0.5
ASK_AGAIN_S = 0.2

HEARTBEAT_MS = 250
GROUP_TIMEOUT_MS = 1000


@dataclass(slots=True)
class Shares:
    """Which way each request takes: submitted singly or in bulk, its result told to whom."""

    single: list[Task]
    bulk: list[Task]
    """Submitted in one go, like the single ones by a producer whose results consumers share."""
    own: list[Task]
    """Submitted in one go by a producer that hears of its results itself."""

    @classmethod
    def of(cls, job: Sequence[Task]) -> Shares:
        """Streams of each share, and others."""
        streams = [task for task in job if task.request.stream]
        others = [task for task in job if not task.request.stream]
        return cls(
            [*streams[:8], *others[:2]],
            [*streams[8:10], *others[2:6]],
            [*streams[10:], *others[6:]],
        )


@dataclass(slots=True)
class Books:
    """What users have written down: it outlives their processes, like a database."""

    job: list[Task] = field(default_factory=make_job)
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    consumed: dict[RequestId, list[Result]] = field(default_factory=lambda: defaultdict(list))
    produced: dict[RequestId, list[Result]] = field(default_factory=lambda: defaultdict(list))
    chunks: dict[RequestId, list[Chunk]] = field(default_factory=lambda: defaultdict(list))

    @property
    def shares(self) -> Shares:
        return Shares.of(self.job)


@dataclass(slots=True)
class Run:
    """What the processes of one run have in common."""

    namespace: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    books: Books = field(default_factory=Books)
    attempts: Attempts = field(default_factory=dict)


async def _produce(run: Run, url: str, process: FaultyProcess) -> None:
    """Submit everything, under ids that are the same in every life; follow what becomes of it."""
    shares = run.books.shares
    async with (
        Producer(url, namespace=run.namespace, results=RESULTS) as sharing,
        Producer(url, namespace=run.namespace) as alone,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(_submit_in_bulk(run, alone, shares.own))
        tasks.create_task(_submit_in_bulk(run, sharing, shares.bulk))
        for task in shares.single:
            request = task.request
            handle = await sharing.submit(
                request.prompt.text,
                sampling=request.sampling,
                request_id=request.request_id,
                stream=request.stream,
            )
            if request.stream:
                tasks.create_task(_follow(run.books, handle))
        run.books.submitted.set()


async def _submit_in_bulk(run: Run, producer: Producer, tasks: Sequence[Task]) -> None:
    async for result in producer.submit_many([task.request for task in tasks]):
        run.books.produced[result.request_id].append(result)


async def _consume(run: Run, url: str, process: FaultyProcess) -> None:
    """Store results until there is one for each request that has consumers."""
    shares = run.books.shares
    num_expected = len(shares.single) + len(shares.bulk)
    async with Consumer(
        url, results=RESULTS, namespace=run.namespace, take_over_after_s=TAKE_OVER_AFTER_S
    ) as consumer:
        deliveries = aiter(consumer)
        while len(run.books.consumed) < num_expected:
            delivery = await anext(deliveries)
            run.books.consumed[delivery.result.request_id].append(delivery.result)
            await delivery.ack()


async def _read(run: Run, url: str, process: FaultyProcess) -> None:
    """Follow the streams that somebody else has submitted in bulk."""
    shares = run.books.shares
    await run.books.submitted.wait()
    async with Producer(url, namespace=run.namespace) as reader, asyncio.TaskGroup() as tasks:
        for task in (*shares.bulk, *shares.own):
            if task.request.stream:
                tasks.create_task(_follow(run.books, reader.attach(task.request_id)))


async def _follow(books: Books, handle: RequestHandle) -> None:
    """Write down a stream, from behind what is written down already."""
    chunks = books.chunks[handle.request_id]
    while True:
        after = StreamPosition.behind(chunks[-1]) if chunks else None
        try:
            async for chunk in handle.stream(after):
                chunks.append(chunk)
            return
        except ResultGone:  # it is not submitted yet
            await asyncio.sleep(ASK_AGAIN_S)


async def _schedule(run: Run, url: str, process: FaultyProcess) -> None:
    """The scheduler."""
    settings = SchedulerSettings.load(
        redis_url=url, namespace=run.namespace, group_timeout_ms=GROUP_TIMEOUT_MS
    )
    _stop_of_context.set(run.stop)
    await scheduler.service.run(settings)


async def _work(run: Run, url: str, process: FaultyProcess) -> None:
    """The worker group, under the same name in every life."""
    settings = WorkerSettings.load(
        redis_url=url,
        namespace=run.namespace,
        model="stub:",
        group_id="group",
        block_size=BLOCK_SIZE,
        max_num_seqs=NUM_REQUESTS,
        heartbeat_ms=HEARTBEAT_MS,
        group_timeout_ms=GROUP_TIMEOUT_MS,
        flush_ms=1,
    )
    _stop_of_context.set(run.stop)
    worker_of_context.set((process, run.attempts))
    await gpu_worker.service.run(settings)


PROGRAMS: dict[str, Callable[[Run, str, FaultyProcess], Coroutine[Any, Any, None]]] = {
    "producer": _produce,
    "scheduler": _schedule,
    "worker": _work,
    "consumer": _consume,
    "reader": _read,
}

_stop_of_context: ContextVar[asyncio.Event] = ContextVar("stop")


@asynccontextmanager
async def _stop_signal() -> AsyncIterator[asyncio.Event]:
    """In place of `service.lifecycle.shutdown_signals`: processes here have no signals."""
    yield _stop_of_context.get()


@contextmanager
def services_in_process() -> Iterator[None]:
    """Inside, services take their signals and their ranks from here, and wait less long."""
    changes = (
        (gpu_worker.service, "shutdown_signals", _stop_signal),
        (gpu_worker.service, "open_ranks", open_in_process_ranks),
        (scheduler.service, "shutdown_signals", _stop_signal),
        (scheduler.service, "TAKE_OVER_EVERY_S", 0.2),
        (scheduler.intake, "SCHEDULER_TTL_MS", 600),
        (scheduler.intake, "BLOCK_MS", 200),
        # Each new connection reads it from the disk.
        (redis.utils, "get_lib_version", cache(redis.utils.get_lib_version)),
    )
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(patch.object(module, name, value))
        yield
