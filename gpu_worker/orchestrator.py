"""A worker group's parent process: it talks to Redis, so that the ranks only compute.

    inbox stream -> take_in -> rank 0 -> give_out (text, stop strings) -> flush -> journals, results

It holds no tensor and never waits for a forward pass. Losing a rank ends the group: the scheduler
gives its requests to others. Being declared dead (after a pause longer than the group's timeout)
does not: the group drops what it held and joins again under a new epoch.
"""

from __future__ import annotations

import asyncio
import os
import time

import structlog
from redis.asyncio import Redis

from gpu_worker.inbox import Inbox
from gpu_worker.ledger import Ledger
from gpu_worker.membership import Membership
from gpu_worker.output import TextDecoder
from gpu_worker.rank_group import RankGroup, RankLost
from gpu_worker.rank_protocol import AbortRequests, AddRequests, EngineStats, StepOutput
from service.resilience import one_error, repeat, sleep_unless
from service.settings import WorkerSettings
from wire.errors import RequestExpired
from wire.ids import GroupId, RequestId
from wire.keys import Keys
from wire.messages import ErrorInfo, GroupStatus, ModelCard, TerminalState
from wire.records import error_info
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

COMMIT_AT_ONCE = 256
STOP_TIMEOUT_S = 10.0
TICK_S = 0.05


class Orchestrator:
    """One worker group between Redis and its ranks; all of it belongs to one event loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        card: ModelCard,
        ranks: RankGroup,
        *,
        client: Redis,
        blocking_client: Redis,
    ) -> None:
        keys = Keys(settings.namespace)
        self._settings = settings
        self._card = card
        self._ranks = ranks
        self._scripts = Scripts(client, keys)
        self._inbox = Inbox(client, blocking_client, keys)
        self._ledger = Ledger(
            TextDecoder(card.tokenizer_json), model=card.name, block_size=card.block_size
        )
        self._membership = Membership(
            settings.redis_url.get_secret_value(),
            client,
            keys,
            group_id=GroupId(settings.group_id or os.urandom(4).hex()),
            card=card,
            heartbeat_s=settings.heartbeat_ms / 1000,
            timeout_ms=settings.group_timeout_ms,
            status=self._status,
        )
        self._stats = EngineStats()
        self._draining = False
        self._to_flush = asyncio.Event()
        self._left = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain. Raises RankLost."""
        await self._join()
        try:
            with one_error(RankLost):
                await self._serve(stop)
        except BaseException:
            await self._membership.crash()
            raise
        await self._membership.leave()

    async def _serve(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            give_out = tasks.create_task(self._give_out(), name="give_out")
            loops = [
                tasks.create_task(repeat(step.__name__, step, stop=self._left))
                for step in (self._take_in, self._flush, self._end_late_requests)
            ]
            await stop.wait()
            await self._drain()
            self._left.set()
            self._to_flush.set()
            await asyncio.wait(loops, timeout=STOP_TIMEOUT_S)
            for task in (*loops, give_out):
                task.cancel()

    async def _join(self) -> None:
        await self._membership.join()
        self._inbox.open(self._membership.group_id, self._membership.epoch)

    async def _drain(self) -> None:
        """Take no more; wait for what runs, as long as the settings allow."""
        self._draining = True
        log.info("draining", num_requests=len(self._ledger))
        give_up_s = time.monotonic() + self._settings.drain_timeout_s
        while len(self._ledger) and time.monotonic() < give_up_s:
            await asyncio.sleep(TICK_S)

    def _status(self, epoch: int) -> GroupStatus:
        stats = self._stats
        return GroupStatus(
            group_id=self._membership.group_id,
            epoch=epoch,
            model=self._card.name,
            tensor_parallel_size=self._settings.tensor_parallel_size,
            # As many again as run: the engine never waits for the queue.
            credits=2 * self._settings.max_num_seqs,
            state="draining" if self._draining else "healthy",
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_cache_usage=stats.kv_cache_usage,
        )

    # In: from the inbox to the ranks

    async def _take_in(self) -> None:
        if self._membership.lost.is_set():
            log.warning("declared dead", epoch=self._membership.epoch)
            await self._abort(self._ledger.clear())
            await self._join()
        mail = await self._inbox.read()
        for item in mail.undecodable:
            log.error("assignment refused", request_id=item.request_id, error=item.error.message)
            self._ledger.refuse(item.request_id, item.fence, item.error)
            self._to_flush.set()
        for assignment in mail.assignments:
            self._ledger.open(assignment)
        if mail.assignments:
            await self._ranks.send(AddRequests(tuple(mail.assignments)))
        for request_id in mail.cancelled:
            await self._end(request_id, "cancelled")
        await self._inbox.delete(mail)

    async def _end_late_requests(self) -> None:
        for request_id in self._ledger.past_deadline(self._membership.server_ms()):
            late = RequestExpired("the deadline passed while the request was running")
            await self._end(request_id, "expired", error_info(late))
        await sleep_unless(self._left, TICK_S)

    async def _end(
        self, request_id: RequestId, state: TerminalState, error: ErrorInfo | None = None
    ) -> None:
        if self._ledger.end(request_id, state, error):
            self._to_flush.set()
            await self._abort([request_id])

    async def _abort(self, request_ids: list[RequestId]) -> None:
        if request_ids:
            await self._ranks.send(AbortRequests(tuple(request_ids)))

    # Out: from the ranks to Redis

    async def _give_out(self) -> None:
        while True:
            frame = await self._ranks.receive()
            if not isinstance(frame, StepOutput):
                raise RankLost(f"rank 0 sent {type(frame).__name__} in place of StepOutput")
            self._stats = frame.stats
            await self._abort(self._ledger.add(frame.outputs))
            if frame.outputs:
                self._to_flush.set()

    async def _flush(self) -> None:
        """Write all that is new, in as few calls as can be."""
        await self._to_flush.wait()
        # Tokens that come in the meantime go out with these.
        await sleep_unless(self._left, self._settings.flush_ms / 1000)
        self._to_flush.clear()
        try:
            while progress := self._ledger.uncommitted()[:COMMIT_AT_ONCE]:
                stale = await self._scripts.commit(
                    self._membership.group_id, self._membership.epoch, progress
                )
                await self._abort(self._ledger.committed(progress, stale))
        except BaseException:
            self._to_flush.set()  # what was not written is written next time
            raise
