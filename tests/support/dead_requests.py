"""Requests that failed for good, by the shortest way."""

from __future__ import annotations

from support.queue_driver import QueueDriver
from wire.codec import encode
from wire.errors import RequestFailed
from wire.records import ending
from wire.scripts import Ending


async def let_die(
    queue: QueueDriver, *request_ids: str, reason: str = "worker_lost", message: str = "it died"
) -> None:
    """Have queued requests dead-lettered, one after the other on the server's clock."""
    result = encode(ending("failed", RequestFailed(message, reason=reason)))
    for died_ms, request_id in enumerate(request_ids, start=await _last_death_ms(queue) + 1):
        queued = await queue.queued(request_id)
        await queue.scripts.reject([Ending(queued, "failed", result, dead=reason)])
        # Deaths in one millisecond would have no order.
        await queue.client.zadd(queue.keys.dead_letters, {request_id: died_ms})


async def _last_death_ms(queue: QueueDriver) -> int:
    newest = await queue.client.zrange(queue.keys.dead_letters, -1, -1, withscores=True)
    return int(newest[0][1]) if newest else 0
