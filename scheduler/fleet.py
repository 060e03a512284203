"""Watching the worker groups, and taking back what dead ones held."""

from __future__ import annotations

import time

import structlog

from scheduler.policy.fleet_view import FleetView, GroupView
from wire.codec import decode, encode
from wire.errors import RequestFailed, WireError
from wire.messages import GroupStatus
from wire.records import ending
from wire.scripts import FleetEntry, Scripts

log = structlog.get_logger(__name__)

RECLAIM_LIMIT = 500


class Fleet:
    """The latest view of the groups."""

    def __init__(self, scripts: Scripts, *, max_attempts: int) -> None:
        self._scripts = scripts
        self._max_attempts = max_attempts
        self._seen_s = 0.0
        self.view = FleetView({})

    def server_ms(self) -> int:
        """The server's clock, reckoned from when it was last read."""
        return self.view.server_ms + int((time.monotonic() - self._seen_s) * 1000)

    async def refresh(self) -> tuple[set[str], set[str]]:
        """Look at all groups; bury the dead. Returns the keys of those that joined and left."""
        server_ms, entries = await self._scripts.fleet()
        self._seen_s = time.monotonic()
        groups: dict[str, GroupView] = {}
        for entry in entries:
            if entry.status is None:
                await self._bury(entry)
                continue
            try:
                status = decode(GroupStatus, entry.status)
            except WireError as error:
                log.error("group status refused", group_id=entry.group_id, error=str(error))
                continue
            view = GroupView(status, entry.num_owned)
            groups[view.key] = view
        before, now = set(self.view.groups), set(groups)
        self.view = FleetView(groups, server_ms)
        for key in now - before:
            log.info("group joined", group=key, model=groups[key].status.model)
        for key in before - now:
            log.info("group left", group=key)
        return now - before, before - now

    async def _bury(self, dead: FleetEntry) -> None:
        """Put the requests of a group whose heartbeat stopped back into the queue."""
        result = encode(
            ending(
                "failed",
                RequestFailed(
                    f"the worker group died {self._max_attempts} times while it held this request",
                    reason="worker_lost",
                ),
            )
        )
        total = failed_total = 0
        while True:
            counts = await self._scripts.reclaim(
                dead.group_id,
                dead.epoch,
                leaving=False,
                max_attempts=self._max_attempts,
                limit=RECLAIM_LIMIT,
                result=result,
            )
            if counts is None:
                return  # it has just come alive: its first heartbeat was not there yet
            taken, failed = counts
            total, failed_total = total + taken, failed_total + failed
            if taken < RECLAIM_LIMIT:
                break
        log.warning(
            "group dead",
            group_id=dead.group_id,
            epoch=dead.epoch,
            num_requeued=total - failed_total,
            num_failed=failed_total,
        )
