"""Ranks that live in the event loop: the stub engine, and a record of all that it computes.

A step is slower than a flush, as with a real model: the next step waits until what is to be written
of the last one is on its way to the server. So how much a crash may have computed in vain does not
depend on how busy this machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

from crash_points.job import BLOCK_SIZE
from gpu_worker.engine.stub import StubEngine
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import (
    AbortRequests,
    AddRequests,
    FromRank,
    RankReady,
    ToRank,
)
from support.fault_injection import FaultyProcess
from support.step_outputs import SpelledOut
from wire.ids import RequestId

STEP_S = 0.002
FLUSH_WITHIN_S = 0.25
"""After that the engine goes on: what was to be written was written with something before."""

COMMIT = "EVALSHA commit"


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True)
class Life:
    """How far the engine of one worker process got, and how far when it last wrote it down."""

    num_steps: int = 0
    num_steps_committed: int = 0
    committed: asyncio.Event = field(default_factory=_set_event)

    def note_call(self, kind: str) -> None:
        """The worker sends this call to the server."""
        if kind == COMMIT:
            self.num_steps_committed = self.num_steps
            self.committed.set()

    @property
    def num_steps_unwritten(self) -> int:
        """Steps since the last commit."""
        return self.num_steps - self.num_steps_committed


@dataclass(slots=True)
class Attempt:
    """One assignment of a request: how many tokens it began with, how many the engine added."""

    life: Life
    stream: bool
    offset: int
    num_tokens: int = 0

    @property
    def at_most_lost(self) -> int:
        """How many of its tokens may have to be generated again after its group's death.

        Of streams, those of the steps since the last commit; of others also less than a block that
        was left for the next one. That is a block: the engine is not faster than the commits, or
        only where one was lost.
        """
        return self.life.num_steps_unwritten + (0 if self.stream else BLOCK_SIZE - 1)

    @property
    def is_to_be_written(self) -> bool:
        """Whether its latest token is written at once."""
        return self.stream or self.num_tokens % BLOCK_SIZE == 0


Attempts: TypeAlias = dict[RequestId, list[Attempt]]
"""All attempts at each request of a run, in order."""


@dataclass(slots=True)
class Regenerated:
    """How many tokens of one request were generated more than once, at most."""

    most_streamed: int = 0
    most_unstreamed: int = 0

    def note(self, num_tokens: int, *, stream: bool) -> None:
        """That many tokens of a request were generated again."""
        if stream:
            self.most_streamed = max(self.most_streamed, num_tokens)
        else:
            self.most_unstreamed = max(self.most_unstreamed, num_tokens)


class InProcessRanks:
    """Stands in for `RankGroup`."""

    def __init__(self, options: RankOptions, life: Life, attempts: Attempts) -> None:
        self._engine = StubEngine(options, LayerCounter())
        self._life = life
        self._attempts = attempts
        self._running: dict[RequestId, Attempt] = {}
        self._spelled_out = SpelledOut()
        self._added = asyncio.Event()

    async def wait_ready(self, timeout_s: float) -> RankReady:
        engine = self._engine
        return RankReady(engine.num_blocks, engine.max_model_len, engine.vocab_size, load_s=0.0)

    async def send(self, frame: ToRank) -> None:
        match frame:
            case AddRequests(assignments):
                for assignment in assignments:
                    attempt = Attempt(self._life, assignment.stream, len(assignment.generated))
                    self._running[assignment.request_id] = attempt
                    self._attempts.setdefault(assignment.request_id, []).append(attempt)
                    self._engine.add(assignment)
                self._added.set()
            case AbortRequests(request_ids):
                for request_id in request_ids:
                    self._engine.abort(request_id)

    async def receive(self) -> FromRank:
        while not self._engine.has_work:
            self._added.clear()
            await self._added.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WITHIN_S):
                await self._life.committed.wait()
        await asyncio.sleep(STEP_S)
        output = self._engine.step()
        self._life.num_steps += 1
        for sequence in self._spelled_out.outputs(output):
            attempt = self._running[sequence.request_id]
            attempt.num_tokens += len(sequence.token_ids)
            if attempt.is_to_be_written or sequence.finish_reason is not None:
                self._life.committed.clear()
        return output

    def kill(self) -> None:
        """They end with whoever holds them."""


worker_of_context: ContextVar[tuple[FaultyProcess, Attempts]] = ContextVar("worker")
"""The worker process that the present task is a part of, and where its attempts are noted."""


@asynccontextmanager
async def open_in_process_ranks(options: RankOptions, size: int) -> AsyncIterator[InProcessRanks]:
    """In place of `gpu_worker.rank_group.open_ranks`."""
    process, attempts = worker_of_context.get()
    life = Life()
    process.on_send = life.note_call
    yield InProcessRanks(options, life, attempts)
