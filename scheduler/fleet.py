"""Watching the worker groups, and taking back what dead ones held."""

from __future__ import annotations

import time

import structlog
from redis.exceptions import RedisError

from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.leases import LeaseWatch
from wire.codec import decode
from wire.errors import WireError
from wire.messages import GroupStatus
from wire.reclaiming import take_back
from wire.scripts import FleetEntry, Scripts

log = structlog.get_logger(__name__)


class Fleet:
    """The latest view of the groups."""

    def __init__(self, scripts: Scripts, *, max_crashes: int, grace_s: float) -> None:
        self._scripts = scripts
        self._max_crashes = max_crashes
        self._leases = LeaseWatch(grace_s=grace_s)
        self._seen_s = 0.0
        self.view = FleetView({})

    def server_ms(self) -> int:
        """The server's clock, reckoned from when it was last read."""
        return self.view.server_ms + int((time.monotonic() - self._seen_s) * 1000)

    async def refresh(self) -> tuple[set[str], set[str]]:
        """Look at all groups; bury the dead. Returns the keys of those that joined and left."""
        try:
            server_ms, entries = await self._scripts.fleet()
        except RedisError:
            self._leases.look_failed()
            raise
        self._seen_s = time.monotonic()
        by_key = {f"{entry.group_id}:{entry.epoch}": entry for entry in entries}
        verdict = self._leases.look(
            self._seen_s,
            server_ms,
            {key: entry.lease_until_ms for key, entry in by_key.items() if entry.lease_until_ms},
        )
        groups: dict[str, GroupView] = {}
        for key, entry in by_key.items():
            # Without a lease: declared dead, by somebody who has not taken everything from it yet.
            if key in verdict.dead or not entry.lease_until_ms:
                await self._bury(entry)
            elif (status := _status(entry)) is not None:
                groups[key] = GroupView(
                    status,
                    entry.num_owned,
                    late=key in verdict.suspects,
                    exclusive=entry.exclusive,
                )
        before, now = set(self.view.groups), set(groups)
        self.view = FleetView(groups, server_ms)
        for key in now - before:
            log.info("group joined", group=key, model=groups[key].status.model)
        for key in before - now:
            log.info("group left", group=key)
        return now - before, before - now

    async def _bury(self, dead: FleetEntry) -> None:
        """Put the requests of a group whose heartbeat stopped back into the queue."""
        counts = await take_back(
            self._scripts,
            dead.group_id,
            dead.epoch,
            how="lapsed",
            max_crashes=self._max_crashes,
        )
        if counts is None:
            return  # its heartbeat was just late
        num_taken, num_failed = counts
        log.warning(
            "group dead",
            group_id=dead.group_id,
            epoch=dead.epoch,
            num_requeued=num_taken - num_failed,
            num_failed=num_failed,
        )


def _status(entry: FleetEntry) -> GroupStatus | None:
    if entry.status is None:
        return None
    try:
        return decode(GroupStatus, entry.status)
    except WireError as error:
        log.error("group status refused", group_id=entry.group_id, error=str(error))
        return None
