"""A group's place in the fleet: joining it under an epoch, staying alive in it, leaving it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gpu_worker.heartbeat import Heartbeat
from wire.codec import encode
from wire.ids import GroupId
from wire.keys import Keys
from wire.messages import GroupStatus, ModelCard
from wire.records import ending
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

RECLAIM_LIMIT = 500


class Membership:
    """One group's membership; `lost` is set when the fleet has declared it dead.

    `status` is called in the heartbeat's thread, so it must only read.
    """

    def __init__(
        self,
        url: str,
        client: Redis,
        keys: Keys,
        *,
        group_id: GroupId,
        card: ModelCard,
        heartbeat_s: float,
        timeout_ms: int,
        status: Callable[[int], GroupStatus],
    ) -> None:
        self._url = url
        self._client = client
        self._keys = keys
        self._scripts = Scripts(client, keys)
        self._card = card
        self._heartbeat_s = heartbeat_s
        self._timeout_ms = timeout_ms
        self._status = status
        self._heartbeat: Heartbeat | None = None
        self._server_ms = 0
        self._server_seen_s = 0.0
        self.group_id = group_id
        self.epoch = 0
        self.lost = asyncio.Event()

    async def join(self) -> None:
        """Become a member under a new epoch; a member again if the fleet had given this one up."""
        await self._stop_heartbeat()
        self.epoch = await self._scripts.register(
            self.group_id, model=self._card.name, card=encode(self._card)
        )
        self.lost.clear()  # only now: a call that failed is made again
        self._heartbeat = Heartbeat(
            self._url,
            self._keys,
            interval_s=self._heartbeat_s,
            timeout_ms=self._timeout_ms,
            status=lambda: self._status(self.epoch),
            on_time=self._note_time,
            on_lost=self.lost.set,
        )
        await self._heartbeat.start()
        log.info("group joined", group_id=self.group_id, epoch=self.epoch, model=self._card.name)

    async def leave(self) -> None:
        """Be gone at once; give what is not finished back to the queue."""
        await self._stop_heartbeat()
        num_returned = 0
        while True:
            counts = await self._scripts.reclaim(
                self.group_id,
                self.epoch,
                leaving=True,
                max_attempts=1,
                limit=RECLAIM_LIMIT,
                result=encode(ending("failed")),
            )
            num_returned += counts[0] if counts else 0
            if counts is None or counts[0] < RECLAIM_LIMIT:
                break
        log.info("group left", group_id=self.group_id, num_returned=num_returned)

    async def crash(self) -> None:
        """Be known as dead at once. The scheduler counts an attempt against each request."""
        await self._stop_heartbeat()
        log.error("group crashed", group_id=self.group_id, epoch=self.epoch)
        try:
            await self._client.delete(self._keys.status(self.group_id, self.epoch))
        except RedisError as error:
            # It is known after the group's timeout then; what it crashed of matters more here.
            log.warning("crash not reported", error=str(error))

    def server_ms(self) -> int:
        """The server's clock, reckoned from the last heartbeat."""
        return self._server_ms + int((time.monotonic() - self._server_seen_s) * 1000)

    def _note_time(self, server_ms: int) -> None:
        self._server_ms, self._server_seen_s = server_ms, time.monotonic()

    async def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.stop()
