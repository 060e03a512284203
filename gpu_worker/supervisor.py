"""Keeping a group's ranks alive: started, served, and after their loss started again.

    start ranks -> load -> join the fleet -> serve ── loss ──> hand back, end all ranks ─┐
      ▲                                                                                  │
      └────────────────────────── wait (gpu_worker.restarts) ◀───────────────────────────┘

While the ranks load, the group is not a member of the fleet: nothing is routed to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import structlog

from gpu_worker.rank_group import RankGroup, RankLost
from gpu_worker.restarts import RestartPolicy
from service.lifecycle import unless_stopped

log = structlog.get_logger(__name__)


async def supervise(
    start_ranks: Callable[[], AbstractAsyncContextManager[RankGroup]],
    serve: Callable[[RankGroup], Awaitable[None]],
    *,
    policy: RestartPolicy,
    stop: asyncio.Event,
) -> None:
    """Return when `serve` does, which it is to do once `stop` is set.

    `serve` makes use of the ranks from their start on, and tells `policy` when they are ready.
    Raises RankLost when `policy` gives up on them, and anything else that `serve` raises.
    """
    while not stop.is_set():
        try:
            async with start_ranks() as ranks:
                await serve(ranks)
                return
        except RankLost as lost:
            delay_s = policy.lost(time.monotonic())
            if stop.is_set():
                log.warning("ranks lost", reason=str(lost), num_restarts=policy.num_restarts)
                return
            if delay_s is None and policy.num_failed_starts == 1:
                raise
            if delay_s is None:
                raise RankLost(
                    f"the ranks did not start {policy.num_failed_starts} times in a row; "
                    f"the last time: {lost}"
                ) from lost
            log.error(
                "ranks lost",
                reason=str(lost),
                num_restarts=policy.num_restarts,
                restart_in_s=delay_s,
            )
        await unless_stopped(asyncio.sleep(delay_s), stop)
