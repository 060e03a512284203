"""Redis streams with the types that we use: bytes in, bytes out, one shape of reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

Entry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""An entry's id and its fields."""

START = b"0-0"


def id_order(entry_id: bytes) -> tuple[int, int]:
    """Entry ids compare by this, not as text."""
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence or 0)


async def read(
    client: Redis, positions: Mapping[str, bytes], *, count: int, block_ms: int | None = None
) -> dict[str, list[Entry]]:
    """XREAD: for each stream that has some, the entries behind its position."""
    reply = await client.xread(cast("Any", positions), count=count, block=block_ms)
    return _by_stream(reply)


async def read_group(
    client: Redis,
    group: str,
    consumer: str,
    positions: Mapping[str, str | bytes],
    *,
    count: int,
    ttl_ms: int,
    block_ms: int | None = None,
) -> dict[str, list[Entry]]:
    """XREADGROUP. A stream that is gone (expired, flushed) is made again, and nothing returned."""
    try:
        reply = await client.xreadgroup(
            group, consumer, cast("Any", positions), count=count, block=block_ms
        )
    except ResponseError as error:
        if not _is_missing_group(error):
            raise
        for key in positions:
            await ensure_group(client, key, group, ttl_ms=ttl_ms)
        return {}
    return _by_stream(reply)


async def ensure_group(client: Redis, key: str, group: str, *, ttl_ms: int) -> None:
    """Have a consumer group that reads the stream from its beginning, and the stream itself."""
    try:
        # Together: a caller that dies in between would leave a stream that lives for ever.
        async with client.pipeline(transaction=True) as pipe:
            pipe.xgroup_create(key, group, id="0", mkstream=True)
            pipe.pexpire(key, ttl_ms, nx=True)
            await pipe.execute()
    except ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


async def claim(
    client: Redis, key: str, group: str, consumer: str, entry_ids: Sequence[bytes]
) -> list[Entry]:
    """XCLAIM entries for a consumer, however short they were idle; deleted ones are left out."""
    reply = await client.xclaim(key, group, consumer, 0, cast("Any", list(entry_ids)))
    return _entries(reply)


async def claim_idle(
    client: Redis, key: str, group: str, consumer: str, *, min_idle_ms: int, count: int
) -> list[Entry]:
    """XAUTOCLAIM entries whose consumer gave no sign of life for so long."""
    try:
        reply = cast(
            "Any",
            await client.xautoclaim(key, group, consumer, min_idle_time=min_idle_ms, count=count),
        )
    except ResponseError as error:
        if _is_missing_group(error):
            return []
        raise
    return _entries(reply[1])


async def consumers(client: Redis, key: str, group: str) -> dict[str, int]:
    """The consumers of a group, with how many entries are pending for each."""
    return (await consumers_of_all(client, [key], group))[0]


async def consumers_of_all(client: Redis, keys: Sequence[str], group: str) -> list[dict[str, int]]:
    """The consumers of each stream's group of that name, in one round trip."""
    async with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.xinfo_consumers(key, group)
        replies = await pipe.execute(raise_on_error=False)
    return [_consumers(reply) for reply in replies]


async def entries(client: Redis, key: str) -> list[Entry]:
    """All entries of a stream."""
    return (await entries_of_all(client, [key]))[0]


async def entries_of_all(client: Redis, keys: Sequence[str]) -> list[list[Entry]]:
    """All entries of each stream, in one round trip."""
    async with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.xrange(key)
        return [_entries(page) for page in await pipe.execute()]


async def ack_and_delete(client: Redis, key: str, group: str, *entry_ids: bytes) -> None:
    """Acknowledge and delete in one step: an acknowledged entry would stay in the stream."""
    async with client.pipeline(transaction=True) as pipe:
        pipe.xack(key, group, *entry_ids)
        pipe.xdel(key, *entry_ids)
        await pipe.execute()


def _consumers(reply: Any) -> dict[str, int]:
    if isinstance(reply, ResponseError) and _is_missing_group(reply):
        return {}
    if isinstance(reply, Exception):
        raise reply
    return {consumer["name"].decode(): consumer["pending"] for consumer in reply}


def _is_missing_group(error: ResponseError) -> bool:
    return any(sign in str(error) for sign in ("NOGROUP", "no such key", "UNBLOCKED"))


def _by_stream(reply: Any) -> dict[str, list[Entry]]:
    return {key.decode(): _entries(page) for key, page in reply or []}


def _entries(page: Any) -> list[Entry]:
    # A deleted entry comes as None in place of its fields.
    return [(entry_id, fields) for entry_id, fields in page or [] if fields is not None]
