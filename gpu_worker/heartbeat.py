"""The group's sign of life, from a thread that nothing in the orchestrator can hold up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from wire.client import connect
from wire.codec import encode
from wire.keys import Keys
from wire.messages import GroupStatus
from wire.scripts import Scripts

log = structlog.get_logger(__name__)


class Heartbeat:
    """Writes `status()` every `interval_s`; the group is dead to the others after `timeout_ms`.

    `on_time` gets the server's clock in ms after each beat, `on_lost` is called when the group was
    declared dead in the meantime; both in the event loop that made this object.
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
        self._beaten = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._beat()), name="heartbeat", daemon=True
        )

    async def start(self) -> None:
        """Begin; return after the first beat, from which on the group is alive."""
        self._thread.start()
        await self._beaten.wait()

    async def stop(self) -> None:
        """No beat is on its way any more when this returns."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    async def _beat(self) -> None:
        # A connection that is half open must be given up while there is time for another try.
        client = connect(self._url, timeout_s=self._timeout_ms / 1000 / 3)
        scripts = Scripts(client, self._keys)
        try:
            await self._beat_on(scripts)
        except Exception:
            # A group without a heartbeat is as good as dead: it must hear of it.
            log.exception("heartbeat ended")
            self._loop.call_soon_threadsafe(self._on_lost)
        finally:
            await client.aclose()

    async def _beat_on(self, scripts: Scripts) -> None:
        first = True
        while not self._stop.is_set():
            try:
                server_ms = await self._beat_once(scripts, first=first)
            except RedisError as error:
                log.warning("heartbeat failed", error=str(error))
            else:
                if server_ms is None:
                    self._loop.call_soon_threadsafe(self._on_lost)
                    return
                first = False
                self._loop.call_soon_threadsafe(self._on_time, server_ms)
                self._loop.call_soon_threadsafe(self._beaten.set)
            await asyncio.to_thread(self._stop.wait, self._interval_s)

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
