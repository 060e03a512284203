"""Keeping the processes of a local pipeline up: one that dies is started again.

A process that was killed (by the system, short of memory, or by somebody), or that fails after it
has run for a while, is replaced; its work goes on, as nothing of it was lost. One that ends by
itself right after its start would only do so again: its reason is then the pipeline's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from wire.errors import ForebayError

log = structlog.get_logger(__name__)

MAX_RESTARTS = 5
WINDOW_S = 60.0
SETTLED_AFTER_S = 10.0
DELAY_S = 0.2


class Supervisable(Protocol):
    """A process that can be waited for, asked why it ended, and stopped."""

    async def wait(self) -> object:
        """Return when it has ended."""

    async def stop(self, timeout_s: float) -> None:
        """End it."""

    def was_killed(self) -> bool:
        """Whether a signal ended it."""

    def failure(self) -> ForebayError:
        """Why it ended."""


class Supervised:
    """One process of the pipeline, in all its lives; `start` begins one."""

    def __init__(self, name: str, start: Callable[[], Awaitable[Supervisable]]) -> None:
        self.name = name
        self._start = start
        self._process: Supervisable | None = None
        self._started_s = 0.0
        self._restarts_s: deque[float] = deque(maxlen=MAX_RESTARTS)

    async def start(self) -> None:
        """Begin its first life, or the next one."""
        self._process = await self._start()
        self._started_s = time.monotonic()

    async def keep_up(self) -> None:
        """Start it again whenever it ends; raise why it ended once that is of no use."""
        while True:
            assert self._process is not None
            await self._process.wait()
            now_s = time.monotonic()
            if not self._may_restart(now_s):
                raise self._process.failure()
            self._restarts_s.append(now_s)
            reason = str(self._process.failure())
            log.warning("process restarted", process=self.name, reason=reason)
            await asyncio.sleep(DELAY_S * 2 ** (len(self._restarts_s) - 1))
            await self.start()

    async def stop(self, timeout_s: float) -> None:
        """End it, if it runs."""
        if self._process is not None:
            await self._process.stop(timeout_s)

    def _may_restart(self, now_s: float) -> bool:
        assert self._process is not None
        while self._restarts_s and now_s - self._restarts_s[0] > WINDOW_S:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= MAX_RESTARTS:
            return False
        return self._process.was_killed() or now_s - self._started_s >= SETTLED_AFTER_S
