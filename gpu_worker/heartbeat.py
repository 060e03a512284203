"""The group's sign of life, from a thread that nothing in the orchestrator can hold up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from service.lifecycle import unless_stopped
from wire.client import connect
from wire.codec import encode
from wire.keys import Keys
from wire.messages import GroupStatus
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.05
MAX_RETRY_S = 0.5
NUM_TRIES = 4
"""How often a beat can be tried, each time given up as unanswered, before the lease is over."""


def patience_s(interval_s: float, timeout_s: float, num_failed: int) -> float:
    """How long a try to beat may take that follows so many failed ones, in seconds.

    Even at first, so that NUM_TRIES fit into the lease (`tests/support/lease_simulation.py` shows
    what that is worth); then, as the server seems to be slow, ever longer, but not so long that a
    try into the void outlasts the schedulers' time of grace.
    """
    even_s = (timeout_s - interval_s) / NUM_TRIES
    return min(even_s * 2.0 ** max(0, num_failed + 1 - NUM_TRIES), timeout_s / 2)


class Heartbeat:
    """Writes `status()` every `interval_s`; each beat renews the group's lease for `timeout_ms`.

    A beat that fails is tried again at once, then after ever longer pauses. `on_time` gets the
    server's clock in ms after each beat, `on_lost` is called when the group was declared dead in
    the meantime; both in the event loop that made this object.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        interval_s: float,
        timeout_ms: int,
        status: Callable[[], GroupStatus],
        on_time: Callable[[int], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._url = url
        self._keys = keys
        self._interval_s = interval_s
        self._timeout_ms = timeout_ms
        self._status = status
        self._on_time = on_time
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._begun = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._beat()), name="heartbeat", daemon=True
        )

    async def start(self, stop: asyncio.Event) -> bool:
        """Begin; return after the first beat, or when there will be none. False: `stop` was set."""
        self._thread.start()
        return await unless_stopped(self._begun.wait(), stop) is not None

    async def stop(self) -> None:
        """No beat is on its way any more when this returns."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    async def _beat(self) -> None:
        client = connect(self._url, timeout_s=self._timeout_ms / 1000)
        try:
            await self._beat_on(Scripts(client, self._keys))
        except Exception:
            # A group without a heartbeat is as good as dead: it must hear of it.
            log.exception("heartbeat ended")
            self._loop.call_soon_threadsafe(self._on_lost)
        finally:
            self._loop.call_soon_threadsafe(self._begun.set)
            await client.aclose()

    async def _beat_on(self, scripts: Scripts) -> None:
        first, num_failed, retry_s = True, 0, FIRST_RETRY_S
        while not self._stop.is_set():
            try:
                async with asyncio.timeout(
                    patience_s(self._interval_s, self._timeout_ms / 1000, num_failed)
                ):
                    server_ms = await self._beat_once(scripts, first=first)
            except (RedisError, TimeoutError) as error:
                log.warning("heartbeat failed", error=str(error) or "no answer in time")
                pause_s, retry_s = retry_s, min(2 * retry_s, MAX_RETRY_S)
                num_failed += 1
            else:
                if server_ms is None:
                    self._loop.call_soon_threadsafe(self._on_lost)
                    return
                self._loop.call_soon_threadsafe(self._on_time, server_ms)
                self._loop.call_soon_threadsafe(self._begun.set)
                pause_s, retry_s = self._interval_s, FIRST_RETRY_S
                first, num_failed = False, 0
            await asyncio.to_thread(self._stop.wait, pause_s)

    async def _beat_once(self, scripts: Scripts, *, first: bool) -> int | None:
        status = self._status()
        return await scripts.heartbeat(
            status.group_id,
            status.epoch,
            timeout_ms=self._timeout_ms,
            first=first,
            model=status.model,
            status=encode(status),
        )
