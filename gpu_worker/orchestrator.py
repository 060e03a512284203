"""One life of a worker group, from ready ranks to their loss or the group's end.

    inbox stream -> take_in -> rank 0 -> give_out (text, stop strings) -> flush -> journals, results
                                             |
                                             +-> what is cached now -> directory

The orchestrator talks to Redis, so that the ranks only compute; it holds no tensor and never waits
for a forward pass. When the ranks are lost, it hands back what they held, and its life ends; the
group's next one (`gpu_worker.supervisor`) has new ranks and a new epoch. Being declared dead (after
a pause longer than the group's lease) is less: the ranks are well, so the group drops what it held
and joins again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from redis.asyncio import Redis

from gpu_worker.committer import Committer
from gpu_worker.directory_keeper import DirectoryKeeper
from gpu_worker.hang_watch import HangWatch
from gpu_worker.inbox import Inbox, Mail
from gpu_worker.ledger import Ledger
from gpu_worker.membership import Membership
from gpu_worker.rank_group import RankGroup, RankLost
from gpu_worker.rank_protocol import (
    AbortRequests,
    AddRequests,
    EngineStats,
    StepOutput,
    StepProgress,
)
from gpu_worker.text import TextDecoder
from service.lifecycle import unless_stopped
from service.resilience import one_error, repeat, sleep_unless
from service.settings import WorkerSettings
from wire.errors import RequestExpired
from wire.ids import GroupId, RequestId
from wire.keys import Keys
from wire.messages import ErrorInfo, GroupStatus, ModelCard, TerminalState
from wire.records import error_info
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

STOP_TIMEOUT_S = 10.0
TICK_S = 0.05
MAX_LOOK_S = 0.25
LOOKS_PER_TIMEOUT = 20


class Orchestrator:
    """Stands between Redis and one set of ranks; all of it belongs to one event loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        card: ModelCard,
        decoder: TextDecoder,
        ranks: RankGroup,
        *,
        group_id: GroupId,
        client: Redis,
        blocking_client: Redis,
        cache_format: str,
        on_answer: Callable[[], None],
    ) -> None:
        """`on_answer` is called when the ranks have answered a request."""
        keys = Keys(settings.namespace)
        scripts = Scripts(client, keys)
        self._settings = settings
        self._card = card
        self._ranks = ranks
        self._cache_format = cache_format
        self._on_answer = on_answer
        self._inbox = Inbox(client, blocking_client, keys)
        self._ledger = Ledger(decoder, model=card.name, block_size=card.block_size)
        self._membership = Membership(
            settings.redis_url.get_secret_value(),
            client,
            keys,
            group_id=group_id,
            card=card,
            heartbeat_s=settings.heartbeat_ms / 1000,
            timeout_ms=settings.group_timeout_ms,
            max_crashes=settings.max_crashes,
            status=self._status,
        )
        self._committer = Committer(
            scripts,
            self._ledger,
            self._membership,
            flush_s=settings.flush_ms / 1000,
            abort=self._abort,
        )
        self._directory = DirectoryKeeper(scripts, self._membership)
        self._hang_watch = HangWatch(settings.step_timeout_s)
        self._stats = EngineStats()
        self._in_doubt = False
        self._draining = False
        self._has_deadlines = asyncio.Event()
        self._left = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain. Raises RankLost."""
        try:
            with one_error(RankLost):
                await self._serve(stop)
        except BaseException as error:
            # Nothing of theirs is waited for: a rank that hangs would hold up the requests.
            self._ranks.kill()
            await self._committer.flush_last()
            await self._membership.crash(str(error))
            raise
        await self._committer.flush_last()
        await self._membership.leave()

    async def _serve(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            watches = [
                tasks.create_task(self._give_out(), name="give_out"),
                tasks.create_task(self._watch_progress(), name="watch_progress"),
            ]
            steps: dict[str, Callable[[], Awaitable[None]]] = {
                "take_in": lambda: self._take_in(stop),
                "flush": lambda: self._committer.flush(self._left),
                "end_late_requests": self._end_late_requests,
                "keep_directory": lambda: self._directory.keep(self._left),
            }
            loops = [
                tasks.create_task(
                    repeat(name, step, stop=self._left, on_reconnect=self._doubt), name=name
                )
                for name, step in steps.items()
            ]
            await stop.wait()
            await self._drain()
            self._left.set()
            self._committer.wake()
            self._directory.wake()
            # One that never became a member has nothing to write, and nobody to wait for.
            patience_s = STOP_TIMEOUT_S if self._membership.is_member else 0.0
            await asyncio.wait(loops, timeout=patience_s)
            for task in (*loops, *watches):
                task.cancel()

    async def _drain(self) -> None:
        """Take no more; wait for what runs, as long as the settings allow."""
        self._draining = True
        log.info("draining", num_requests=len(self._ledger))
        give_up_s = time.monotonic() + self._settings.drain_timeout_s
        while len(self._ledger) and time.monotonic() < give_up_s:
            await asyncio.sleep(TICK_S)

    async def _watch_progress(self) -> None:
        look_s = min(MAX_LOOK_S, self._settings.step_timeout_s / LOOKS_PER_TIMEOUT)
        while not self._hang_watch.is_hung(time.monotonic(), busy=self._ledger.num_running > 0):
            await asyncio.sleep(look_s)
        raise RankLost(
            f"the ranks have {self._ledger.num_running} requests to compute and have not got on "
            f"for {self._settings.step_timeout_s:g} s: one of them hangs"
        )

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
            cache_format=self._cache_format,
        )

    # In: from the inbox to the ranks

    async def _take_in(self, stop: asyncio.Event) -> None:
        if not self._membership.is_member:
            await self._join(stop)
        mail = await unless_stopped(self._unless_lost(self._inbox.read()), self._left)
        if mail is None:
            return
        for item in mail.undecodable:
            log.error("assignment refused", request_id=item.request_id, error=item.error.message)
            self._ledger.refuse(item.request_id, item.fence, item.error)
            self._committer.wake()
        for assignment in mail.assignments:
            self._ledger.open(assignment)
        if self._ledger.has_deadlines:
            self._has_deadlines.set()
        if mail.assignments:
            await self._ranks.send(AddRequests(tuple(mail.assignments)))
        for request_id in mail.cancelled:
            await self._end(request_id, "cancelled")
        await self._inbox.delete_read()
        if self._in_doubt:
            self._in_doubt = not await self._committer.reconcile(self._inbox.position)

    async def _unless_lost(self, reading: Coroutine[Any, Any, Mail]) -> Mail | None:
        return await unless_stopped(reading, self._membership.lost)

    async def _join(self, stop: asyncio.Event) -> None:
        if self._membership.lost.is_set():
            log.warning("declared dead", epoch=self._membership.epoch)
        await self._abort(self._ledger.clear())
        await self._membership.join(stop)
        self._directory.joined()
        self._inbox.open(self._membership.group_id, self._membership.epoch)

    async def _doubt(self) -> None:
        """The server was away: does it still know what it knew?"""
        self._in_doubt = True
        self._directory.doubt()

    async def _end_late_requests(self) -> None:
        for request_id in self._ledger.past_deadline(self._membership.server_ms()):
            late = RequestExpired("the deadline passed while the request was running")
            await self._end(request_id, "expired", error_info(late))
        if self._ledger.has_deadlines:
            await sleep_unless(self._left, TICK_S)
        else:
            self._has_deadlines.clear()
            await unless_stopped(self._has_deadlines.wait(), self._left)

    async def _end(
        self, request_id: RequestId, state: TerminalState, error: ErrorInfo | None = None
    ) -> None:
        if self._ledger.end(request_id, state, error):
            self._committer.wake()
            await self._abort([request_id])

    async def _abort(self, request_ids: list[RequestId]) -> None:
        if request_ids:
            await self._ranks.send(AbortRequests(tuple(request_ids)))

    # Out: from the ranks to Redis

    async def _give_out(self) -> None:
        while True:
            frame = await self._ranks.receive()
            self._hang_watch.progress()
            match frame:
                case StepProgress():
                    continue
                case StepOutput():
                    await self._take_step(frame)
                case _:
                    raise RankLost(f"rank 0 sent {type(frame).__name__} in place of StepOutput")

    async def _take_step(self, step: StepOutput) -> None:
        self._stats = step.stats
        if step.cache_changes:
            self._directory.note(step.cache_changes)
        stopped = self._ledger.add(step.outputs)
        stopped += self._ledger.add_tokens(step.indices, step.token_ids)
        await self._abort(stopped)
        if self._ledger.is_due:
            self._committer.wake()
        if any(output.finish_reason is not None for output in step.outputs):
            self._on_answer()
