"""A group's inbox on real servers: read once, freed once it is read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker.inbox import Inbox
from support.queue_driver import QueueDriver, open_queue
from wire.ids import GroupId

GROUP = GroupId("g")


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


async def inbox_of(queue: QueueDriver, epoch: int) -> Inbox:
    inbox = Inbox(queue.client, queue.client, queue.keys)
    inbox.open(GROUP, epoch)
    return inbox


async def num_entries(queue: QueueDriver, epoch: int) -> int:
    return int(await queue.client.xlen(queue.keys.inbox(GROUP, epoch)))


async def test_assignments_and_cancellations_come_once(queue: QueueDriver) -> None:
    epoch = await queue.join()
    await queue.submit("a", "b")
    await queue.assign("a", "b")
    await queue.cancel("b")
    inbox = await inbox_of(queue, epoch)
    mail = await inbox.read()
    assert [item.request_id for item in mail.assignments] == ["a", "b"]
    assert mail.cancelled == ["b"]
    await inbox.delete_read()
    assert await num_entries(queue, epoch) == 0
    await queue.submit("c")
    await queue.assign("c")
    assert [item.request_id for item in (await inbox.read()).assignments] == ["c"]


async def test_what_could_not_be_freed_is_freed_with_the_next(
    queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = await queue.join()
    await queue.submit("a", "b")
    await queue.assign("a")
    inbox = await inbox_of(queue, epoch)
    await inbox.read()

    async def unreachable(*args: Any) -> int:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(queue.client, "xdel", unreachable)
        with pytest.raises(RedisConnectionError):
            await inbox.delete_read()
    await queue.assign("b")
    assert [item.request_id for item in (await inbox.read()).assignments] == ["b"]
    await inbox.delete_read()
    assert await num_entries(queue, epoch) == 0
