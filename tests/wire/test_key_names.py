"""Key names: what may be part of one, and that the table in `wire.keys` tells all of them."""

from __future__ import annotations

import asyncio
import re
from typing import cast

import pytest

import wire.keys
from producer.handle import RequestHandle
from producer.producer import Producer
from scheduler.service import open_scheduler
from service.settings import SchedulerSettings
from support.queue_driver import NAMESPACE, end, open_queue, tokens
from wire.errors import ConfigError, InvalidRequest, RequestCancelled
from wire.ids import GroupId
from wire.keys import MAX_NAME_CHARS, Keys, check_name, check_request_id
from wire.scripts import DirectoryUpdate


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * MAX_NAME_CHARS, "..", "-"])
def test_a_plain_name_can_be_part_of_a_key(name: str) -> None:
    assert check_name("namespace", name) == name
    assert check_request_id(name) == name


@pytest.mark.parametrize(
    "name", ["", "a:b", "a b", "{a}", "a\n", "ä", "*", "a\0", "x" * (MAX_NAME_CHARS + 1)]
)
def test_what_could_be_taken_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used: take 1 to 200 of the characters"):
        check_name("namespace", name)
    with pytest.raises(InvalidRequest, match="request_id") as caught:
        check_request_id(name)
    assert caught.value.field == "request_id"
    with pytest.raises(ConfigError):
        Keys(name)


def test_partitions_have_hash_tags_of_their_own() -> None:
    tags = {re.findall(r"\{.*?\}", Keys("n", partition).salt)[0] for partition in range(3)}
    assert tags == {"{n:0}", "{n:1}", "{n:2}"}


def documented() -> dict[str, re.Pattern[str]]:
    """Each row of the table as a pattern."""
    names = re.findall(r"^\| `([^`]+)`", wire.keys.__doc__ or "", flags=re.MULTILINE)
    prefix = re.escape(Keys(NAMESPACE).prefix)
    return {
        name: re.compile(prefix + ":" + re.sub("<[^>]+>", "[A-Za-z0-9_.-]+", name))
        for name in names
    }


async def read_all(handle: RequestHandle) -> None:
    async for _ in handle:
        pass


async def test_the_table_has_every_key_and_every_field_that_is_written(redis_url: str) -> None:
    """Requests in all classes, through all ends, with all processes taking part."""
    written: set[str] = set()
    fields: set[str] = set()

    async with open_queue(redis_url) as queue:

        async def look() -> None:
            for key in cast("list[bytes]", await queue.client.keys()):
                written.add(key.decode())
                if b":request:" in key or b":dead:" in key:
                    names = cast("list[bytes]", await queue.client.hkeys(key.decode()))
                    fields.update(name.decode() for name in names)

        await queue.submit("a", "b", stream=True, timeout_ms=60_000)
        await queue.submit("c", priority="interactive")
        await queue.submit("d", "e", priority="batch")
        await queue.join()
        await queue.assign("e", exclusive=True)
        await queue.commit(end("e", 1, "retry"))
        await look()
        await queue.retry(max_errors=1)
        await queue.assign("a", "b", "c")
        update = DirectoryUpdate(1, device=bytes(16), host=bytes(range(16)))
        assert await queue.scripts.directory_update(GroupId("g"), await queue.epoch(), update) == 1
        await queue.cancel("b")
        await queue.commit(tokens("a", 1, 0, 5))
        await look()
        await queue.commit(end("a", 1))
        await queue.kill()
        await queue.reclaim(limit=1)
        await look()
        await queue.reclaim()
        await queue.cancel("c")
        await queue.cancel("d")
        await queue.client.config_set("appendonly", "yes")
        async with Producer(redis_url, namespace=NAMESPACE) as producer:
            await producer.submit("Hi", request_id="f", durable=True)
            await queue.cancel("f")
            while not await queue.client.keys("*bell*"):
                # The producer's blocked read is woken by whoever waits for one more stream.
                handle = await producer.submit("Hi")
                reading = asyncio.create_task(read_all(handle))
                await asyncio.sleep(0.01)
                await handle.cancel()
                with pytest.raises(RequestCancelled):
                    await reading
        settings = SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE)
        async with open_scheduler(settings) as scheduler:
            stop = asyncio.Event()
            running = asyncio.create_task(scheduler.run(stop))
            while not await queue.client.keys("*scheduler:*"):
                await asyncio.sleep(0.01)
            await look()
            stop.set()
            await running
        await look()

    table = documented()
    for key in written:
        assert any(pattern.fullmatch(key) for pattern in table.values()), f"{key} is not in it"
    for name, pattern in table.items():
        assert any(pattern.fullmatch(key) for key in written), f"nobody writes {name}"
    record = (wire.keys.__doc__ or "").partition("The record's fields:")[2]
    assert fields == set(re.findall(r"`(\w+)`", record))
