"""Keeping the fleet's directory of cached blocks up to date with one group's cache.

The step loop only notes what changed. A task of its own writes it, a few calls a second, on a
connection of its own out of the pool: neither steps nor commits wait for it, however slow the
server is.
"""

from __future__ import annotations

import asyncio

import structlog

from cache.directory import Holdings
from gpu_worker.membership import Membership
from gpu_worker.rank_protocol import CacheChanges
from service.resilience import next_beat
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

UPDATE_EVERY_S = 0.1
"""What was sent to a group lately, the schedulers count as cached there anyway."""


class DirectoryKeeper:
    """Writes under the epoch that `membership` has at the time.

    A group that joins again, with the same ranks, still has its blocks: they are published anew.
    """

    def __init__(
        self, scripts: Scripts, membership: Membership, *, every_s: float = UPDATE_EVERY_S
    ) -> None:
        self._scripts = scripts
        self._membership = membership
        self._every_s = every_s
        self._holdings = Holdings()
        self._epoch = 0
        self._in_doubt = False
        self._is_due = asyncio.Event()

    def note(self, changes: CacheChanges) -> None:
        """A step changed what the group has cached."""
        self._holdings.change(changes.device, changes.host, changes.gone)
        if self._holdings.has_news:
            self._is_due.set()

    def joined(self) -> None:
        """The group has a new epoch: nothing is known of its cache under that."""
        self._holdings.start_life()
        self._epoch = self._membership.epoch
        self._is_due.set()

    def doubt(self) -> None:
        """The server was away: does it still know what it knew?"""
        self._in_doubt = True
        self._is_due.set()

    def wake(self) -> None:
        """Return from `keep` soon, if it waits for something to do."""
        self._is_due.set()

    async def keep(self, hurry: asyncio.Event) -> None:
        """Wait until something is to be written, and a moment for more, and write it all."""
        await self._is_due.wait()
        await next_beat(hurry, self._every_s)
        self._is_due.clear()
        try:
            await self._write(hurry)
        except BaseException:
            self.doubt()
            raise

    @property
    def _is_current(self) -> bool:
        return self._membership.is_member and self._membership.epoch == self._epoch

    async def _write(self, hurry: asyncio.Event) -> None:
        """At the group's end nothing is written: all that it has cached is unlinked then."""
        while self._is_current and not hurry.is_set():
            # A doubt that comes up while the update is on its way is one for afterwards.
            ask, self._in_doubt = self._in_doubt, False
            update = self._holdings.next_update(ask=ask)
            if update is None:
                return
            epoch = self._epoch
            last = await self._scripts.directory_update(self._membership.group_id, epoch, update)
            if last is None or epoch != self._epoch:
                return  # the group joins again, and then writes all
            if not self._holdings.answered(update, last):
                log.warning(
                    "cache published anew",
                    number=update.number,
                    last_number=last,
                    num_blocks=len(self._holdings),
                )
