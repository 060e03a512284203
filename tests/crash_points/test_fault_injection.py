"""The harness itself: faults strike where they are said to, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from support.fault_injection import Fault, FaultyProcess, ProcessDied, faulty_connections
from wire.client import connect
from wire.streams import read


@pytest.fixture(autouse=True)
def injecting() -> Iterator[None]:
    with faulty_connections():
        yield


@asynccontextmanager
async def process(url: str, *faults: Fault) -> AsyncIterator[tuple[FaultyProcess, Redis]]:
    """A process with one client."""
    faulty = FaultyProcess("test", faults, on_death=lambda: None)
    async with connect(f"{url}?client_name=test") as client:
        yield faulty, client


async def value(url: str) -> bytes | None:
    async with connect(url) as client:
        found = await client.get("{t}:number")
    assert found is None or isinstance(found, bytes)
    return found


async def test_a_process_that_is_killed_before_a_call_has_not_sent_it(redis_url: str) -> None:
    async with process(redis_url, Fault("SET number", 2, "kill_before")) as (faulty, client):
        await client.set("{t}:number", 1, px=9000)
        with pytest.raises(ProcessDied):
            await client.set("{t}:number", 2, px=9000)
    assert faulty.is_dead
    assert await value(redis_url) == b"1"


async def test_a_process_that_is_killed_after_a_call_has_changed_the_server(redis_url: str) -> None:
    async with process(redis_url, Fault("SET number", 1, "kill_after")) as (faulty, client):
        with pytest.raises(ProcessDied):
            await client.set("{t}:number", 1, px=9000)
    assert faulty.is_dead
    assert await value(redis_url) == b"1"


async def test_a_process_that_misses_a_reply_goes_on(redis_url: str) -> None:
    async with process(redis_url, Fault("SET number", 1, "drop_reply")) as (faulty, client):
        with pytest.raises(ConnectionError):
            await client.set("{t}:number", 1, px=9000)
        assert await client.get("{t}:number") == b"1"
    assert not faulty.is_dead
    assert faulty.struck == {("SET number", 1)}


async def test_a_dead_process_sends_nothing_and_its_blocked_reads_end(redis_url: str) -> None:
    async with process(redis_url) as (faulty, client):
        reading = asyncio.create_task(read(client, {"{t}:stream": b"0-0"}, count=1, block_ms=4000))
        while not faulty.num_in_flight["XREAD stream"]:
            await asyncio.sleep(0)
        faulty.die()
        with pytest.raises(ProcessDied):
            await reading
        with pytest.raises(ProcessDied):
            await client.set("{t}:number", 1, px=9000)
    assert await value(redis_url) is None


async def test_a_transaction_is_one_call(redis_url: str) -> None:
    kind = "MULTI + SET number + PEXPIRE number + EXEC"
    async with (
        process(redis_url, Fault(kind, 1, "kill_after")) as (_, client),
        client.pipeline(transaction=True) as pipe,
    ):
        pipe.set("{t}:number", 1)
        pipe.pexpire("{t}:number", 9000)
        with pytest.raises(ProcessDied):
            await pipe.execute()
    assert await value(redis_url) == b"1"
