"""Noticing that what somebody waits for will never come.

Streams tell what has happened, unless the server was flushed, lost its last second, or dropped a
stream whose time was over: then a waiting reader would wait for ever. The records hold the truth,
so requests that have been waited for a while are looked up there: every few seconds, and at once
when the server is back after it was away. It costs one round trip for 500 of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from redis.asyncio import Redis
from redis.exceptions import RedisError

from wire.backoff import retry_delays
from wire.ids import RequestId
from wire.keys import Keys
from wire.records import TERMINAL_STATES

CHECK_AFTER_S = 5.0
"""How long something has been waited for in vain before it is looked up, and looked up again."""

PAGE = 500
MAX_AT_A_TIME = 2000
"""Of more requests than that, those are looked up that were not for the longest time."""


@dataclass(eq=False, slots=True)
class _Wait:
    request_id: RequestId
    alert: Callable[[], None]
    num_read: int | None
    checked_s: float


class Reconciler:
    """Looks up what is waited for, and alerts those who wait in vain."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._waits: dict[_Wait, None] = {}  # the one that was looked up longest ago is first
        self._hurry = asyncio.Event()

    @contextmanager
    def watch(
        self, request_id: RequestId, alert: Callable[[], None], *, num_read: int | None = None
    ) -> Iterator[None]:
        """While inside, call `alert` when the record says that waiting is in vain.

        That is: the request has ended, there is no record of it, or its journal holds more than
        the `num_read` tokens that the caller has (None: the tokens do not matter). A caller that
        was about to be told otherwise may be alerted too. It may happen again and again.
        """
        wait = _Wait(request_id, alert, num_read, time.monotonic())
        self._waits[wait] = None
        try:
            yield
        finally:
            del self._waits[wait]

    def hurry(self) -> None:
        """Look everything up now: the server was away, and may have lost something."""
        self._hurry.set()

    async def run(self) -> None:
        """Look things up until cancelled."""
        delays = retry_delays()
        while True:
            in_hurry = await self._pause()
            self._hurry.clear()
            try:
                await self._check(None if in_hurry else MAX_AT_A_TIME)
                delays = retry_delays()
            except RedisError:
                # Whoever reads from the server reports it, if it stays away.
                await asyncio.sleep(next(delays))
                if in_hurry:
                    self._hurry.set()

    async def _pause(self) -> bool:
        """Wait until it is time; returns whether that is so because of `hurry`."""
        try:
            async with asyncio.timeout(CHECK_AFTER_S):
                return await self._hurry.wait()
        except TimeoutError:
            return False

    async def _check(self, at_most: int | None) -> None:
        checked_before_s = time.monotonic() - (0 if at_most is None else CHECK_AFTER_S)
        due = [wait for wait in islice(self._waits, at_most) if wait.checked_s <= checked_before_s]
        for first in range(0, len(due), PAGE):
            page = due[first : first + PAGE]
            for wait, in_vain in zip(page, await self._look_up(page), strict=True):
                if wait in self._waits:
                    wait.checked_s = time.monotonic()
                    self._waits[wait] = self._waits.pop(wait)
                    if in_vain:
                        wait.alert()

    async def _look_up(self, waits: Sequence[_Wait]) -> list[bool]:
        async with self._client.pipeline(transaction=False) as pipe:
            for wait in waits:
                pipe.hmget(self._keys.request(wait.request_id), "state", "num_journaled")
            records = await pipe.execute()
        return [
            _is_in_vain(wait, state, num_journaled)
            for wait, (state, num_journaled) in zip(waits, records, strict=True)
        ]


def _is_in_vain(wait: _Wait, state: bytes | None, num_journaled: bytes | None) -> bool:
    if state is None or state.decode() in TERMINAL_STATES:
        return True
    return wait.num_read is not None and int(num_journaled or 0) > wait.num_read
