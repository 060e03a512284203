"""The scheduler's main loops, and how they fit together.

    intake streams -> read -> [arrived] -> prepare -> [pending, by model] -> dispatch -> groups
                                              ^                                ^
                                         catalog (tokenizers)          fleet (groups' credits)

All state belongs to this one event loop; what takes long (tokenizing) runs in a thread on values.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from scheduler.backlog import Backlog
from scheduler.catalog import ModelCatalog
from scheduler.dispatcher import Dispatcher
from scheduler.fleet import Fleet
from scheduler.intake import Intake
from scheduler.policy.looking import Looking
from scheduler.policy.planning import BatchLimits
from scheduler.preparer import Preparer
from scheduler.salts import TenantSalts
from service.lifecycle import shutdown_signals, unless_stopped
from service.resilience import next_beat, one_error, repeat, sleep_unless
from service.settings import SchedulerSettings
from wire.client import connect, ping, redis_errors
from wire.keys import Keys
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

FULL_POLL_S = 0.02
EXPIRE_EVERY_S = 0.25
RETRY_EVERY_S = 0.5
TAKE_OVER_EVERY_S = 1.0
STOP_TIMEOUT_S = 10.0
RETRY_LIMIT = 500


async def run(settings: SchedulerSettings) -> None:
    """Schedule until SIGTERM or SIGINT; what is queued stays queued for the next scheduler.

    Raises ServerUnreachable when the server does not answer at the start, or refuses us later.
    """
    url = settings.redis_url.get_secret_value()
    async with shutdown_signals() as stop, open_scheduler(settings) as scheduler:
        with redis_errors(url), one_error():
            await scheduler.run(stop)


@contextlib.asynccontextmanager
async def open_scheduler(settings: SchedulerSettings) -> AsyncIterator[SchedulerService]:
    """A scheduler with its connections, which are closed at the end."""
    url = settings.redis_url.get_secret_value()
    client, blocking_client = connect(url), connect(url, blocking=True)
    try:
        await ping(client, url)
        keys = Keys(settings.namespace)
        scripts = Scripts(client, keys)
        with redis_errors(url):
            salts = await TenantSalts.shared(client, keys)
        yield SchedulerService(
            settings,
            scripts,
            intake=Intake(client, blocking_client, keys),
            fleet=Fleet(
                scripts,
                max_crashes=settings.max_crashes,
                grace_s=settings.group_timeout_ms / 1000,
            ),
            catalog=ModelCatalog(client, keys),
            salts=salts,
        )
    finally:
        await client.aclose()
        await blocking_client.aclose()


class SchedulerService:
    """The loops of one scheduler."""

    def __init__(
        self,
        settings: SchedulerSettings,
        scripts: Scripts,
        *,
        intake: Intake,
        fleet: Fleet,
        catalog: ModelCatalog,
        salts: TenantSalts,
    ) -> None:
        self._settings = settings
        self._scripts = scripts
        self._intake = intake
        self._fleet = fleet
        self._catalog = catalog
        self._backlog = Backlog()
        self._preparer = Preparer(
            self._backlog, intake=intake, catalog=catalog, fleet=fleet, salts=salts
        )
        limits = BatchLimits(
            max_tokens=settings.max_batch_tokens,
            max_requests=settings.max_batch_requests,
            max_wait_s=settings.max_batch_wait_ms / 1000,
        )
        self._dispatcher = Dispatcher(
            self._backlog,
            scripts,
            limits,
            intake=intake,
            catalog=catalog,
            fleet=fleet,
            salts=salts,
        )
        self._looking = Looking()
        self._cards_to_read: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Run all loops until `stop` is set."""
        await self._intake.open()
        log.info("scheduler started", namespace=self._settings.namespace)
        loops = {
            "read": (self._read, self._read_again),
            "prepare": (self._preparer.prepare, None),
            "dispatch": (self._dispatcher.dispatch, None),
            "watch_fleet": (self._watch_fleet, None),
            "expire": (self._expire, None),
            "retry": (self._retry, None),
            "take_over": (self._take_over, self._read_again),
        }
        self._stop = stop
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(
                    repeat(name, step, stop=stop, on_reconnect=on_reconnect), name=name
                )
                for name, (step, on_reconnect) in loops.items()
            ]
            await stop.wait()
            self._backlog.close()
            # Every step ends by itself within a second or two; a server that hangs must not
            # keep us from leaving.
            _, late = await asyncio.wait(running, timeout=STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
        await self._intake.close()
        log.info("scheduler stopped", num_left_queued=len(self._backlog))

    async def _read(self) -> None:
        # Each class has a window of its own: a flood of one must not keep another out.
        room = self._backlog.room(self._settings.window)
        if not any(n > 0 for n in room.values()):
            await sleep_unless(self._stop, FULL_POLL_S)
        elif (arrivals := await unless_stopped(self._intake.read(room), self._stop)) is not None:
            self._backlog.arrive(arrivals)

    async def _read_again(self) -> None:
        self._backlog.arrive(await self._intake.read_again())

    async def _take_over(self) -> None:
        await self._intake.heartbeat()
        num_taken = 0
        async for arrivals in self._intake.take_over(self._backlog.room(self._settings.window)):
            self._backlog.arrive(arrivals)
            num_taken += len(arrivals)
        if not num_taken:
            await next_beat(self._stop, TAKE_OVER_EVERY_S)

    async def _expire(self) -> None:
        """End what its deadline has caught up with while nobody could take it."""
        late = self._backlog.late(self._fleet.server_ms())
        for queued in late:
            await self._intake.end_late(queued)
        if late:
            # Afterwards, so that an error loses none. One that is sent in the meantime was ended
            # already, and is left out of its batch.
            self._backlog.discard(late)
        await next_beat(self._stop, EXPIRE_EVERY_S)

    async def _retry(self) -> None:
        """Queue again what has waited after an error, and fail what had too many."""
        num_queued, num_failed = await self._scripts.retry(
            max_errors=self._settings.max_errors,
            delay_ms=self._settings.retry_delay_ms,
            max_delay_ms=self._settings.max_retry_delay_ms,
            limit=RETRY_LIMIT,
        )
        if num_queued or num_failed:
            log.info("requests retried", num_requeued=num_queued, num_failed=num_failed)
        await next_beat(self._stop, RETRY_EVERY_S)

    async def _watch_fleet(self) -> None:
        joined, left = await self._fleet.refresh()
        for key in left:
            self._dispatcher.forget_group(key)
        # Remembered until they were read: a group joins only once.
        self._cards_to_read.update(self._fleet.view.groups[key].status.model for key in joined)
        while self._cards_to_read:
            model = min(self._cards_to_read)
            await self._catalog.refresh(model)
            self._cards_to_read.discard(model)
            self._backlog.to_prepare.set()
        if self._backlog.num_pending:
            self._backlog.to_dispatch.set()
        pause_s = self._looking.next_s(num_waiting=len(self._backlog), fleet=self._fleet.view)
        await next_beat(self._stop, pause_s)
