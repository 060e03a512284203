"""Who is at work and what waits, as the server knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from wire.client import connect, redis_errors
from wire.codec import decode
from wire.keys import Keys
from wire.messages import GroupStatus
from wire.scripts import Scripts

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """How many schedulers are alive, the heartbeats of the groups that are, and what waits.

    `num_queued` requests wait for a group, `num_delayed` for another attempt after an error;
    `num_dead_letters` have failed for good and are kept to be looked into.
    """

    num_schedulers: int
    groups: tuple[GroupStatus, ...]
    num_queued: int
    num_delayed: int
    num_dead_letters: int


async def fleet_status(url: str, namespace: str) -> FleetStatus:
    """The fleet at this moment. Raises ServerUnreachable."""
    client = connect(url)
    keys = Keys(namespace)
    try:
        with redis_errors(url):
            num_schedulers = 0
            async for _ in client.scan_iter(match=_escape(keys.scheduler("")) + "*", count=1000):
                num_schedulers += 1
            server_ms, entries = await Scripts(client, keys).fleet()
            num_queued = sum([await client.xlen(intake) for intake in keys.intakes.values()])
            num_delayed = await client.zcard(keys.delayed)
            num_dead_letters = await client.zcard(keys.dead_letters)
    finally:
        await client.aclose()
    beats = [
        decode(GroupStatus, entry.status)
        for entry in entries
        if entry.status is not None and entry.lease_until_ms > server_ms
    ]
    return FleetStatus(
        num_schedulers,
        tuple(sorted(beats, key=lambda beat: beat.group_id)),
        num_queued,
        num_delayed,
        num_dead_letters,
    )


async def wait_until_serving(url: str, namespace: str, *, num_groups: int) -> list[str]:
    """Wait until `num_groups` groups are ready, and return the names of the models they serve.

    Raises ServerUnreachable when the server at `url` goes away meanwhile.
    """
    while True:
        status = await fleet_status(url, namespace)
        if status.num_schedulers > 0 and len(status.groups) >= num_groups:
            return sorted({group.model for group in status.groups})
        await asyncio.sleep(_POLL_S)


def _escape(key: str) -> str:
    """The key as a pattern that matches just itself."""
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in key)
