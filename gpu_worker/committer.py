"""Writing what the ledger owes to Redis: a few calls a second, whatever the number of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from gpu_worker.ledger import Ledger
from gpu_worker.membership import Membership
from service.resilience import sleep_unless
from wire.ids import RequestId
from wire.scripts import Scripts

log = structlog.get_logger(__name__)

COMMIT_AT_ONCE = 256
LAST_COMMIT_S = 2.0


class Committer:
    """Commits under the epoch that `membership` has at the time.

    `abort` is awaited with requests that turn out not to be the group's any more.
    """

    def __init__(
        self,
        scripts: Scripts,
        ledger: Ledger,
        membership: Membership,
        *,
        flush_s: float,
        abort: Callable[[list[RequestId]], Awaitable[None]],
    ) -> None:
        self._scripts = scripts
        self._ledger = ledger
        self._membership = membership
        self._flush_s = flush_s
        self._abort = abort
        self._is_due = asyncio.Event()
        # A commit that overtakes a reconciliation would make what that has found out untrue.
        self._one_at_a_time = asyncio.Lock()

    def wake(self) -> None:
        """Something is to be written."""
        self._is_due.set()

    async def flush(self, hurry: asyncio.Event) -> None:
        """Wait until something is to be written, and a moment for more, and write it all."""
        await self._is_due.wait()
        await sleep_unless(hurry, self._flush_s)
        self._is_due.clear()
        try:
            await self._commit()
        except BaseException:
            self._is_due.set()  # what was not written is written next time
            raise

    async def flush_last(self) -> None:
        """Write what there is, if the server answers soon: then it is not computed again."""
        try:
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit()
        except Exception as error:
            # At this point the requests are to be handed back, come what may.
            log.warning("last tokens not written", error=repr(error))

    async def reconcile(self, position: bytes) -> bool:
        """Agree with a server that was away, and may have lost its last moments, on what is held.

        Requests that we are done with, or never heard of, go back into the queue; tokens that are
        lost are written again. `position` is how far the inbox was read; False if there is
        something behind it, which is to be read first.
        """
        async with self._one_at_a_time:
            agreed = await self._scripts.reconcile(
                self._membership.group_id,
                self._membership.epoch,
                position,
                self._ledger.request_ids,
            )
            if agreed is None:
                return False
            num_rewound = self._ledger.rewind(agreed.num_journaled)
        if agreed.num_released or num_rewound:
            log.warning(
                "server lost its last moments",
                num_released=agreed.num_released,
                num_rewound=num_rewound,
            )
        self._is_due.set()
        return True

    async def _commit(self) -> None:
        while True:
            async with self._one_at_a_time:
                progress = self._ledger.uncommitted()[:COMMIT_AT_ONCE]
                if not progress:
                    return
                stale = await self._scripts.commit(
                    self._membership.group_id, self._membership.epoch, progress
                )
                to_stop = self._ledger.committed(progress, stale)
            await self._abort(to_stop)
