"""Taking back all that a group holds, when it dies or leaves."""

from __future__ import annotations

from wire.codec import encode
from wire.errors import RequestFailed
from wire.ids import GroupId
from wire.records import ending
from wire.scripts import ReclaimReason, Scripts

RECLAIM_LIMIT = 500
"""So many requests in one call: a script holds up everybody else."""


async def take_back(
    scripts: Scripts,
    group_id: GroupId,
    epoch: int,
    *,
    how: ReclaimReason,
    max_crashes: int,
    reason: str = "",
    model: str | None = None,
) -> tuple[int, int] | None:
    """How many requests were taken from the group, and how many of them failed for good.

    None if it is alive after all. `reason` and `model` are for the results of those that failed.
    """
    message = (
        f"worker groups died {max_crashes} times or more while they held this request, the last "
        "time when they held nothing else"
    )
    died = RequestFailed(f"{message}: {reason}" if reason else message, reason="worker_lost")
    result = encode(ending("failed", died, model=model))
    num_taken = num_failed = 0
    while True:
        counts = await scripts.reclaim(
            group_id, epoch, how=how, max_crashes=max_crashes, limit=RECLAIM_LIMIT, result=result
        )
        if counts is None:
            return None
        num_taken, num_failed = num_taken + counts[0], num_failed + counts[1]
        if counts[0] < RECLAIM_LIMIT:
            return num_taken, num_failed
