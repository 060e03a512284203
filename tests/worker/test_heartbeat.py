"""A group's sign of life, and its place in the fleet, against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.heartbeat import Heartbeat
from gpu_worker.membership import Membership
from support.queue_driver import QueueDriver, open_queue, tokens
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


async def lease_ms(queue: QueueDriver) -> int:
    """How long the one group's lease still lasts."""
    server_ms, [entry] = await queue.scripts.fleet()
    return entry.lease_until_ms - server_ms


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
    assert await beats.heartbeat.start(asyncio.Event())
    [entry] = await fleet(queue)
    assert decode(GroupStatus, entry.status or b"") == status(1)
    assert await lease_ms(queue) > 4000
    await beats.heartbeat.stop()


async def test_beats_go_on_while_the_event_loop_is_held_up(
    queue: QueueDriver, redis_url: str
) -> None:
    beats = Beats(redis_url, queue, timeout_ms=300)
    await beats.heartbeat.start(asyncio.Event())
    time.sleep(0.7)  # noqa: ASYNC251 - this is the point
    assert await lease_ms(queue) > 0
    await asyncio.sleep(0)
    assert len(beats.times) > 1
    assert beats.times == sorted(beats.times)
    await beats.heartbeat.stop()


async def test_no_beat_comes_after_the_stop(queue: QueueDriver, redis_url: str) -> None:
    beats = Beats(redis_url, queue)
    await beats.heartbeat.start(asyncio.Event())
    await beats.heartbeat.stop()
    [before] = await fleet(queue)
    await beats.heartbeat.stop()
    assert await fleet(queue) == [before]


async def test_being_declared_dead_is_noticed_once(queue: QueueDriver, redis_url: str) -> None:
    beats = Beats(redis_url, queue)
    await beats.heartbeat.start(asyncio.Event())
    await queue.reclaim("g", 1, how="crashed")
    await asyncio.wait_for(beats.lost.wait(), 10)
    await beats.heartbeat.stop()
    assert await fleet(queue) == []


async def test_a_beat_that_fails_is_tried_again_long_before_the_next_is_due(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat a minute, of which the first is refused and the second gets no answer."""
    beats = Beats(redis_url, queue, timeout_ms=60_600)
    beats.heartbeat._interval_s = 60.0
    beat_once = beats.heartbeat._beat_once
    tries: list[float] = []

    async def unlucky(*args: Any, **options: Any) -> int | None:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise RedisConnectionError("refused")
        if len(tries) == 2:
            await asyncio.sleep(30)
        return await beat_once(*args, **options)

    monkeypatch.setattr(beats.heartbeat, "_beat_once", unlucky)
    async with asyncio.timeout(10):
        await beats.heartbeat.start(asyncio.Event())
    assert len(tries) == 3
    await beats.heartbeat.stop()


# Membership


def membership(queue: QueueDriver, url: str, *, timeout_ms: int = 5000) -> Membership:
    return Membership(
        url,
        queue.client,
        queue.keys,
        group_id=GROUP,
        card=stub_model_card(name="m"),
        heartbeat_s=0.02,
        timeout_ms=timeout_ms,
        max_crashes=3,
        status=status,
    )


async def test_leaving_gives_requests_back_and_counts_nothing(
    queue: QueueDriver, redis_url: str
) -> None:
    member = membership(queue, redis_url)
    await member.join(asyncio.Event())
    await queue.submit("a")
    await queue.assign("a")
    server_ms = (await queue.scripts.fleet())[0]
    assert abs(member.server_ms() - server_ms) < 5000
    await member.leave()
    assert await queue.queue() == ["a"]
    assert (await queue.record("a"))["num_crashes"] == b"0"
    assert await fleet(queue) == []


async def test_a_crash_gives_requests_back_at_once_and_counts(
    queue: QueueDriver, redis_url: str
) -> None:
    member = membership(queue, redis_url)
    await member.join(asyncio.Event())
    await queue.submit("a", "b")
    await queue.assign("a", "b")
    await member.crash("rank 1 was killed")
    assert sorted(await queue.queue()) == ["a", "b"]
    assert (await queue.record("a"))["num_crashes"] == b"1"
    assert await fleet(queue) == []


async def test_a_request_that_crashes_its_group_again_and_again_fails_with_the_reason(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.submit("poison")
    for _ in range(3):
        member = membership(queue, redis_url)
        await member.join(asyncio.Event())
        await queue.assign("poison")
        await member.crash("rank 1 was killed by SIGSEGV")
    result = await queue.result("poison")
    assert result is not None
    assert result.error is not None
    assert result.error.code == "worker_lost"
    assert "3 times or more" in result.error.message
    assert "rank 1 was killed by SIGSEGV" in result.error.message


async def test_a_group_that_was_given_up_joins_again_under_a_new_epoch(
    queue: QueueDriver, redis_url: str
) -> None:
    member = membership(queue, redis_url)
    await member.join(asyncio.Event())
    first = member.epoch
    await queue.submit("a")
    await queue.assign("a")
    await queue.reclaim(how="crashed")
    await asyncio.wait_for(member.lost.wait(), 10)
    await member.join(asyncio.Event())
    assert member.is_member
    assert member.epoch > first
    assert [entry.epoch for entry in await fleet(queue)] == [member.epoch]
    assert await queue.commit(tokens("a", 1, 0, 5), epoch=first) == ["a"], "its past is over"
    await member.leave()


async def test_a_failed_attempt_to_join_again_is_not_the_last(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = membership(queue, redis_url)
    await member.join(asyncio.Event())
    await queue.reclaim(how="crashed")
    await asyncio.wait_for(member.lost.wait(), 10)

    async def unreachable(*args: Any, **options: Any) -> int:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(member._scripts, "register", unreachable)
        with pytest.raises(RedisConnectionError):
            await member.join(asyncio.Event())
    assert not member.is_member, "so the orchestrator tries again"
    await member.join(asyncio.Event())
    assert [entry.epoch for entry in await fleet(queue)] == [member.epoch]
    await member.leave()


@contextlib.contextmanager
def silent_server(directory: Path) -> Any:
    """The URL of a server that accepts connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "s"))
        listener.listen()
        yield f"unix://{directory}/s"


async def test_a_server_that_is_away_holds_up_no_stop(queue: QueueDriver, tmp_path: Path) -> None:
    """Neither while the first beat is waited for, nor when there is something to give back."""
    with silent_server(tmp_path) as url:
        member = membership(queue, url, timeout_ms=500)
        stop = asyncio.Event()
        joining = asyncio.create_task(member.join(stop))
        async with asyncio.timeout(5):
            while not member.epoch:
                await asyncio.sleep(0.01)
            stop.set()
            await joining
            await member.leave()


async def test_requests_that_cannot_be_given_back_are_left_to_the_lease(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = membership(queue, redis_url, timeout_ms=300)
    await member.join(asyncio.Event())
    num_tries = 0

    async def unreachable(*args: Any, **options: Any) -> tuple[int, int]:
        nonlocal num_tries
        num_tries += 1
        raise RedisConnectionError("away")

    monkeypatch.setattr(member._scripts, "reclaim", unreachable)
    async with asyncio.timeout(5):
        await member.crash("for a test")
    assert num_tries > 1
    [entry] = await fleet(queue)
    assert entry.epoch == member.epoch
