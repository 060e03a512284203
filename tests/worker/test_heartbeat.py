"""A group's sign of life, and its place in the fleet, against real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.heartbeat import Heartbeat
from gpu_worker.membership import Membership
from support.queue_driver import QueueDriver, open_queue
from wire.codec import decode
from wire.ids import GroupId
from wire.messages import GroupStatus
from wire.scripts import FleetEntry

GROUP = GroupId("g")


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


def status(epoch: int) -> GroupStatus:
    return GroupStatus(GROUP, epoch, "m", 1, 8, "healthy")


async def fleet(queue: QueueDriver) -> list[FleetEntry]:
    return (await queue.scripts.fleet())[1]


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


class Beats:
    """A heartbeat and what it reported."""

    def __init__(self, url: str, queue: QueueDriver, *, timeout_ms: int = 5000) -> None:
        self.times: list[int] = []
        self.lost = asyncio.Event()
        self.heartbeat = Heartbeat(
            url,
            queue.keys,
            interval_s=0.02,
            timeout_ms=timeout_ms,
            status=lambda: status(1),
            on_time=self.times.append,
            on_lost=self.lost.set,
        )


async def test_a_group_is_alive_from_its_first_beat_on(queue: QueueDriver, redis_url: str) -> None:
    beats = Beats(redis_url, queue)
    await beats.heartbeat.start()
    [entry] = await fleet(queue)
    assert decode(GroupStatus, entry.status or b"") == status(1)
    await beats.heartbeat.stop()


async def test_beats_go_on_while_the_event_loop_is_held_up(
    queue: QueueDriver, redis_url: str
) -> None:
    beats = Beats(redis_url, queue, timeout_ms=300)
    await beats.heartbeat.start()
    time.sleep(0.7)  # noqa: ASYNC251 - this is the point
    [entry] = await fleet(queue)
    assert entry.status is not None
    await asyncio.sleep(0)
    assert len(beats.times) > 1
    assert beats.times == sorted(beats.times)
    await beats.heartbeat.stop()


async def test_no_beat_comes_after_the_stop(queue: QueueDriver, redis_url: str) -> None:
    beats = Beats(redis_url, queue)
    await beats.heartbeat.start()
    await beats.heartbeat.stop()
    await queue.kill("g", 1)
    await beats.heartbeat.stop()
    assert [entry.status for entry in await fleet(queue)] == [None]


async def test_being_declared_dead_is_noticed_once(queue: QueueDriver, redis_url: str) -> None:
    beats = Beats(redis_url, queue)
    await beats.heartbeat.start()
    await queue.kill("g", 1)
    await asyncio.wait_for(beats.lost.wait(), 10)
    await beats.heartbeat.stop()
    assert [entry.status for entry in await fleet(queue)] == [None]


# Membership


def membership(queue: QueueDriver, url: str, client: Any = None) -> Membership:
    return Membership(
        url,
        client or queue.client,
        queue.keys,
        group_id=GROUP,
        card=stub_model_card(name="m"),
        heartbeat_s=0.02,
        timeout_ms=5000,
        status=status,
    )


async def test_leaving_gives_requests_back_without_an_attempt(
    queue: QueueDriver, redis_url: str
) -> None:
    member = membership(queue, redis_url)
    await member.join()
    await queue.submit("a")
    await queue.assign("a")
    server_ms = (await queue.scripts.fleet())[0]
    assert abs(member.server_ms() - server_ms) < 5000
    await member.leave()
    assert await queue.queue() == ["a"]
    assert (await queue.record("a"))["attempts"] == b"0"
    assert await fleet(queue) == []


async def test_a_crash_is_known_at_once(queue: QueueDriver, redis_url: str) -> None:
    member = membership(queue, redis_url)
    await member.join()
    await member.crash()
    assert [entry.status for entry in await fleet(queue)] == [None]


async def test_a_group_that_was_given_up_joins_again_under_a_new_epoch(
    queue: QueueDriver, redis_url: str
) -> None:
    member = membership(queue, redis_url)
    await member.join()
    await queue.kill("g", 1)
    await asyncio.wait_for(member.lost.wait(), 10)
    await member.join()
    assert (member.epoch, member.lost.is_set()) == (2, False)
    living = [entry.epoch for entry in await fleet(queue) if entry.status is not None]
    assert living == [2]
    await member.leave()
    await queue.reclaim("g", 1)


async def test_a_failed_attempt_to_join_again_is_not_the_last(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = membership(queue, redis_url)
    await member.join()
    await queue.kill("g", 1)
    await asyncio.wait_for(member.lost.wait(), 10)

    async def unreachable(*args: Any, **options: Any) -> int:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(member._scripts, "register", unreachable)
        with pytest.raises(RedisConnectionError):
            await member.join()
    assert member.lost.is_set(), "so the orchestrator tries again"
    await member.join()
    await eventually(lambda: alive(queue, 2))
    await member.leave()


async def alive(queue: QueueDriver, epoch: int) -> bool:
    return any(entry.epoch == epoch and entry.status for entry in await fleet(queue))
