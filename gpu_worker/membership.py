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
from wire.reclaiming import take_back
from wire.scripts import ReclaimReason, Scripts

log = structlog.get_logger(__name__)

RETRY_S = 0.1


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
        max_crashes: int,
        status: Callable[[int], GroupStatus],
    ) -> None:
        self._url = url
        self._keys = keys
        self._scripts = Scripts(client, keys)
        self._card = card
        self._heartbeat_s = heartbeat_s
        self._timeout_ms = timeout_ms
        self._max_crashes = max_crashes
        self._status = status
        self._heartbeat: Heartbeat | None = None
        self._server_ms = 0
        self._server_seen_s = 0.0
        self.group_id = group_id
        self.epoch = 0
        self.lost = asyncio.Event()

    @property
    def is_member(self) -> bool:
        """Whether the group has joined and, as far as it knows, was not declared dead since."""
        return self._heartbeat is not None and not self.lost.is_set()

    async def join(self, stop: asyncio.Event) -> None:
        """Become a member under a new epoch, for the first time or again.

        Returns early when `stop` is set. After an error, the server's for example, it is to be
        called again.
        """
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
        if await self._heartbeat.start(stop) and self.is_member:
            name = self._card.name
            log.info("group joined", group_id=self.group_id, epoch=self.epoch, model=name)

    async def leave(self) -> None:
        """Be gone at once; give what is not finished back to the queue."""
        num_returned = await self._give_back("leaving", "the group left")
        log.info("group left", group_id=self.group_id, num_returned=num_returned)

    async def crash(self, reason: str) -> None:
        """Be known as dead at once; what is not finished goes back, and counts a crash each."""
        num_returned = await self._give_back("crashed", reason)
        log.error(
            "group crashed", group_id=self.group_id, epoch=self.epoch, num_returned=num_returned
        )

    async def _give_back(self, how: ReclaimReason, reason: str) -> int:
        """Returns how many requests went back, 0 if the server did not answer.

        It is tried for as long as a lease lasts: after that the fleet takes them by itself.
        """
        await self._stop_heartbeat()
        if self._heartbeat is None:
            return 0
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                while True:
                    try:
                        counts = await take_back(
                            self._scripts,
                            self.group_id,
                            self.epoch,
                            how=how,
                            max_crashes=self._max_crashes,
                            reason=reason,
                            model=self._card.name,
                        )
                        assert counts is not None, "only a lapse depends on the lease"
                        return counts[0]
                    except RedisError as error:
                        log.warning("requests not given back yet", error=str(error))
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            log.warning("requests not given back", group_id=self.group_id, epoch=self.epoch)
            return 0

    def server_ms(self) -> int:
        """The server's clock, reckoned from the last heartbeat."""
        return self._server_ms + int((time.monotonic() - self._server_seen_s) * 1000)

    def _note_time(self, server_ms: int) -> None:
        self._server_ms, self._server_seen_s = server_ms, time.monotonic()

    async def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.stop()
