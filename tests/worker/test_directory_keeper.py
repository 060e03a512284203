"""A group's side of the directory, on real servers: what is written, and when all of it again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker import service
from gpu_worker.directory_keeper import DirectoryKeeper
from gpu_worker.engine.stub import stub_model_card
from gpu_worker.membership import Membership
from gpu_worker.rank_protocol import CacheChanges
from service.settings import WorkerSettings
from support.fake_ranks import ranks_that
from support.queue_driver import NAMESPACE, QueueDriver, open_queue
from wire.ids import GroupId
from wire.messages import GroupStatus

BLOCKS = [bytes([number]) * 16 for number in range(20)]


class Group:
    """A group whose ranks are this test."""

    def __init__(self, queue: QueueDriver, url: str) -> None:
        self.queue = queue
        self.membership = Membership(
            url,
            queue.client,
            queue.keys,
            group_id=GroupId("g"),
            card=stub_model_card(name="m"),
            heartbeat_s=0.05,
            timeout_ms=60_000,
            max_crashes=3,
            status=lambda epoch: GroupStatus(GroupId("g"), epoch, "m", 1, 8, "healthy"),
        )
        self.keeper = DirectoryKeeper(queue.scripts, self.membership, every_s=0.01)

    async def join(self) -> None:
        await self.membership.join(asyncio.Event())
        self.keeper.joined()

    async def write(self) -> None:
        self.keeper.wake()
        await self.keeper.keep(asyncio.Event())

    async def directory(self) -> tuple[set[bytes], set[bytes]]:
        """What the directory has under the group's epoch: on the device, in host memory."""
        prefix = f"{self.queue.keys.prefix}:group:g:{self.membership.epoch}:cache"
        device, host = [
            cast("set[bytes]", await self.queue.client.smembers(f"{prefix}:{tier}"))
            for tier in ("device", "host")
        ]
        return device, host

    async def forget(self) -> None:
        """The server loses what it knew of the group's cache."""
        for key in await self.queue.client.keys("*:cache*"):
            await self.queue.client.delete(key)


@pytest.fixture
async def group(redis_url: str) -> AsyncIterator[Group]:
    async with open_queue(redis_url) as queue:
        group = Group(queue, redis_url)
        yield group
        await group.membership.leave()
        assert not await queue.client.keys("*:cache*"), "leaving takes it along"


async def test_what_steps_change_is_written_a_moment_later(group: Group) -> None:
    await group.join()
    group.keeper.note(CacheChanges(device=b"".join(BLOCKS[:5])))
    group.keeper.note(CacheChanges(host=BLOCKS[4], gone=BLOCKS[3]))
    await group.write()
    assert await group.directory() == (set(BLOCKS[:3]), {BLOCKS[4]})


async def test_what_was_cached_before_the_group_joined_is_written_then(group: Group) -> None:
    group.keeper.note(CacheChanges(device=BLOCKS[0]))
    await group.write()
    assert not await group.queue.client.keys("*:cache*")
    await group.join()
    await group.write()
    assert await group.directory() == ({BLOCKS[0]}, set())


async def test_a_group_that_joins_again_publishes_what_it_still_has(group: Group) -> None:
    await group.join()
    group.keeper.note(CacheChanges(device=BLOCKS[0], host=BLOCKS[1]))
    await group.write()
    await group.queue.kill()
    await group.queue.reclaim()
    group.keeper.note(CacheChanges(device=BLOCKS[2]))
    await group.write()
    assert not await group.queue.client.keys("*:cache*"), "nothing is written for the dead"
    await asyncio.wait_for(group.membership.lost.wait(), 10)
    await group.join()
    await group.write()
    assert await group.directory() == ({BLOCKS[0], BLOCKS[2]}, {BLOCKS[1]})


async def test_a_server_that_was_away_is_asked_and_told_again_what_it_lost(group: Group) -> None:
    await group.join()
    group.keeper.note(CacheChanges(device=BLOCKS[0] + BLOCKS[1]))
    await group.write()
    await group.forget()
    group.keeper.doubt()
    await group.write()
    assert await group.directory() == ({BLOCKS[0], BLOCKS[1]}, set())


async def test_a_gap_is_noticed_with_the_next_change(group: Group) -> None:
    await group.join()
    for block in BLOCKS[:3]:
        group.keeper.note(CacheChanges(device=block))
        await group.write()
    await group.forget()
    group.keeper.note(CacheChanges(gone=BLOCKS[0]))
    await group.write()
    assert await group.directory() == ({BLOCKS[1], BLOCKS[2]}, set())


@pytest.mark.parametrize("is_carried_out", [True, False])
async def test_an_update_whose_reply_is_lost_is_repeated(
    group: Group, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool
) -> None:
    await group.join()
    update = group.queue.scripts.directory_update

    async def lost(*args: Any) -> int:
        if is_carried_out:
            await update(*args)
        raise RedisConnectionError("away")

    group.keeper.note(CacheChanges(device=BLOCKS[0]))
    with monkeypatch.context() as patch:
        patch.setattr(group.queue.scripts, "directory_update", lost)
        with pytest.raises(RedisConnectionError):
            await group.write()
    group.keeper.note(CacheChanges(device=BLOCKS[1], gone=BLOCKS[0]))
    await group.keeper.keep(asyncio.Event())  # it is still due
    assert await group.directory() == ({BLOCKS[1]}, set())


async def test_steps_go_on_while_the_server_is_slow(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    await group.join()
    update = group.queue.scripts.directory_update
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await update(*args)

    monkeypatch.setattr(group.queue.scripts, "directory_update", slow)
    group.keeper.note(CacheChanges(device=BLOCKS[0]))
    writing = asyncio.create_task(group.write())
    await begun.wait()
    for block in BLOCKS[1:]:
        group.keeper.note(CacheChanges(device=block))
    go_on.set()
    await writing
    assert await group.directory() == (set(BLOCKS), set())


async def test_ranks_that_are_killed_take_what_they_had_cached_along(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(
        monkeypatch,
        """
        channel.send(ready)
        if life == 1:
            requests()
            changes = CacheChanges(device=bytes(16))
            channel.send(StepOutput((), EngineStats(), cache_changes=changes))
            requests()
            os.kill(os.getpid(), signal.SIGKILL)
        serve()
        """,
    )
    settings = WorkerSettings.load(
        model="stub:", redis_url=redis_url, namespace=NAMESPACE, group_id="g"
    )

    async with open_queue(redis_url) as queue, asyncio.timeout(30):

        async def known() -> list[int]:
            """The epochs under which the directory names the group."""
            [answer] = await queue.scripts.directory_query([bytes(16)])
            return [int(key.partition(":")[2]) for key in answer]

        async def epoch_after(last: int) -> int:
            while (epoch := await queue.epoch()) == last or not (await queue.scripts.fleet())[1]:
                await asyncio.sleep(0.01)
            return epoch

        running = asyncio.create_task(service.run(settings), name="worker group")
        try:
            first = await epoch_after(0)
            await queue.submit("a", "b")
            await queue.assign("a")
            while not (epochs := await known()):
                await asyncio.sleep(0.01)
            assert epochs == [first]
            await queue.assign("b")
            while await queue.client.keys(f"*:{first}:cache*"):
                await asyncio.sleep(0.01)
            await epoch_after(first)
            assert await known() == []
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
