"""What the stream calls make of streams that are not as expected, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
from redis.asyncio import Redis

from wire.client import connect
from wire.streams import (
    START,
    ack_and_delete,
    claim,
    claim_idle,
    consumers,
    ensure_group,
    entries,
    id_order,
    read,
    read_group,
)

TTL_MS = 60_000


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def blocking(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url, blocking=True)
    yield client
    await client.aclose()


async def filled(client: Redis, count: int = 3) -> list[bytes]:
    """A stream `s` with a consumer group `g`."""
    await ensure_group(client, "s", "g", ttl_ms=TTL_MS)
    return [cast("bytes", await client.xadd("s", {"n": str(n)})) for n in range(count)]


def test_ids_compare_as_numbers() -> None:
    ids = [b"2-0", b"10-1", b"10-0", b"9-10", b"9-9", b"9"]
    assert sorted(ids, key=id_order) == [b"2-0", b"9", b"9-9", b"9-10", b"10-0", b"10-1"]


async def test_read_gives_what_is_behind_each_position(client: Redis) -> None:
    first, second, third = await filled(client)
    found = await read(client, {"s": first, "nothing": START}, count=10)
    assert [entry_id for entry_id, _ in found["s"]] == [second, third]
    assert found.keys() == {"s"}
    assert await read(client, {"s": third}, count=10) == {}


async def test_a_group_is_made_once_and_reads_from_the_beginning(client: Redis) -> None:
    await filled(client, 2)
    await ensure_group(client, "s", "g", ttl_ms=TTL_MS)
    found = await read_group(client, "g", "c", {"s": ">"}, count=10, ttl_ms=TTL_MS)
    assert [fields[b"n"] for _, fields in found["s"]] == [b"0", b"1"]


async def test_a_missing_stream_is_made_again(client: Redis) -> None:
    assert await read_group(client, "g", "c", {"s": ">"}, count=10, ttl_ms=TTL_MS) == {}
    assert 0 < await client.pttl("s") <= TTL_MS


async def test_a_stream_that_vanishes_under_a_blocked_read_is_made_again(
    client: Redis, blocking: Redis
) -> None:
    await ensure_group(client, "s", "g", ttl_ms=TTL_MS)
    reading = asyncio.create_task(
        read_group(blocking, "g", "c", {"s": ">"}, count=10, ttl_ms=TTL_MS, block_ms=5000)
    )
    while not (await client.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.01)
    await client.delete("s")
    assert await reading == {}
    assert await client.exists("s")


async def test_consumers_of_nothing_are_none(client: Redis) -> None:
    assert await consumers(client, "s", "g") == {}
    await client.xadd("s", {"n": "0"})
    await client.pexpire("s", TTL_MS)
    assert await consumers(client, "s", "g") == {}
    assert await claim_idle(client, "s", "g", "c", min_idle_ms=0, count=1) == []


async def test_pending_entries_are_counted_and_claimed_unless_deleted(client: Redis) -> None:
    ids = await filled(client)
    await read_group(client, "g", "dead", {"s": ">"}, count=10, ttl_ms=TTL_MS)
    assert await consumers(client, "s", "g") == {"dead": 3}
    await client.xdel("s", ids[0])
    claimed = await claim(client, "s", "g", "heir", ids[:2])
    assert [entry_id for entry_id, _ in claimed] == [ids[1]]
    rest = await claim_idle(client, "s", "g", "heir", min_idle_ms=0, count=10)
    assert [entry_id for entry_id, _ in rest] == ids[1:]


async def test_acknowledged_is_deleted(client: Redis) -> None:
    ids = await filled(client)
    await read_group(client, "g", "c", {"s": ">"}, count=10, ttl_ms=TTL_MS)
    await ack_and_delete(client, "s", "g", *ids[:2])
    assert [entry_id for entry_id, _ in await entries(client, "s")] == ids[2:]
    assert await consumers(client, "s", "g") == {"c": 1}
