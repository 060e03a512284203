"""A worker group on a real server, with processes in the place of ranks that fail on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from forebay.broker_binary import find_broker
from gpu_worker import rank_group, restarts, service
from gpu_worker.rank_group import RankLost
from service.exit_codes import ExitCode, exit_code
from service.settings import WorkerSettings
from support.fake_ranks import ranks_that
from support.queue_driver import NAMESPACE, QueueDriver, open_queue
from wire.errors import ModelError

# What is tested is not the server: one kind of it will do.
pytestmark = pytest.mark.parametrize("broker_binary", [find_broker()], indirect=True)

STEP_TIMEOUT_S = 0.4


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


async def eventually(condition: Callable[[], Awaitable[object]], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


class Group:
    """The worker group "g", run within this process."""

    def __init__(self, queue: QueueDriver, url: str, *, num_ranks: int = 1) -> None:
        self.queue = queue
        settings = WorkerSettings.load(
            model="stub:",
            redis_url=url,
            namespace=NAMESPACE,
            group_id="g",
            tensor_parallel_size=num_ranks,
            step_timeout_s=STEP_TIMEOUT_S,
        )
        self.running = asyncio.create_task(service.run(settings), name="worker group")

    async def epochs(self) -> list[int]:
        """The epoch under which it is a member of the fleet, if it is one."""
        return [entry.epoch for entry in (await self.queue.scripts.fleet())[1]]

    async def assigned(self, request_id: str) -> None:
        """Wait until it is a member, and give it a request."""
        await eventually(self.epochs)
        assert await self.queue.assign(request_id) == [request_id]

    async def stopped(self) -> None:
        """Have it stop in an orderly way."""
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(20):
            await self.running


@contextlib.asynccontextmanager
async def group_on(queue: QueueDriver, url: str, *, num_ranks: int = 1) -> AsyncIterator[Group]:
    group = Group(queue, url, num_ranks=num_ranks)
    try:
        yield group
    finally:
        group.running.cancel()
        await asyncio.gather(group.running, return_exceptions=True)


FAILURES = {
    "reports an error": "channel.send(RankError('out_of_memory', 'no memory')); sys.exit(1)",
    "sends garbage": "sock.sendall(b'x' * 64); time.sleep(60)",
    "says the wrong thing": "channel.send(ready); time.sleep(60)",
    "exits": "sys.exit(3)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "hangs": "time.sleep(60)",
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_ranks_that_fail_are_replaced_and_their_requests_handed_back_at_once(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    ranks_that(
        monkeypatch,
        f"""
        if life == 2:
            time.sleep(0.3)
        channel.send(ready)
        if life == 1:
            requests()
            {failure}
        serve()
        """,
    )
    await queue.submit("a")
    async with group_on(queue, redis_url) as group:
        await group.assigned("a")
        [first] = await group.epochs()
        assigned_s = time.monotonic()
        await eventually(lambda: is_in_state(queue, "a", "queued"))
        assert time.monotonic() - assigned_s < STEP_TIMEOUT_S + 1.0
        assert (await queue.record("a"))["num_crashes"] == b"1"
        assert await group.epochs() == [], "no member while its ranks load"
        await group.assigned("a")
        assert await group.epochs() > [first]
        await eventually(lambda: is_in_state(queue, "a", "done"))
        await group.stopped()


async def test_the_failure_of_another_rank_counts_like_that_of_rank_0(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(
        monkeypatch,
        """
        if rank == 0:
            channel.send(ready)
            requests() if life == 1 else serve()
        elif life == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
        """,
    )
    monkeypatch.setattr(rank_group, "STOP_TIMEOUT_S", 0.1)
    async with group_on(queue, redis_url, num_ranks=2) as group:
        await eventually(group.epochs)
        [first] = await group.epochs()
        await eventually(lambda: is_member_again(group, first))
        await queue.submit("a")
        await group.assigned("a")
        await eventually(lambda: is_in_state(queue, "a", "done"))
        await group.stopped()


async def test_a_slow_step_that_gets_on_is_no_hang(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(
        monkeypatch,
        f"""
        channel.send(ready)
        found = requests()
        for num_layers in range(10):
            time.sleep({STEP_TIMEOUT_S} / 4)
            channel.send(StepProgress(num_layers))
        answer(found)
        serve()
        """,
    )
    await queue.submit("a")
    async with group_on(queue, redis_url) as group:
        await group.assigned("a")
        before = await group.epochs()
        await eventually(lambda: is_in_state(queue, "a", "done"))
        assert await group.epochs() == before
        await group.stopped()


async def test_what_was_answered_before_the_loss_is_not_computed_again(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(monkeypatch, "channel.send(ready); answer(requests()); sys.exit(1)")
    await queue.submit("a")
    async with group_on(queue, redis_url) as group:
        await group.assigned("a")
        await eventually(lambda: is_in_state(queue, "a", "done"))
        assert (await queue.record("a"))["num_crashes"] == b"0"
        await group.stopped()


# The end of it


async def test_ranks_that_do_not_come_up_at_first_end_the_process_with_the_reason(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(monkeypatch, "sys.exit(7)")
    async with group_on(queue, redis_url) as group:
        with pytest.raises(RankLost, match=r"^rank 0 \(pid \d+\) exited with status 7$") as caught:
            await asyncio.wait_for(group.running, 20)
    assert exit_code(caught.value) == ExitCode.PIPELINE_DOWN


async def test_ranks_that_do_not_come_up_again_end_the_process(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)
    ranks_that(monkeypatch, "channel.send(ready) if life == 1 else None; sys.exit(7)")
    async with group_on(queue, redis_url) as group:
        with pytest.raises(RankLost, match="5 times in a row; the last time: rank 0") as caught:
            await asyncio.wait_for(group.running, 20)
        assert await group.epochs() == []
    assert exit_code(caught.value) == ExitCode.PIPELINE_DOWN


async def test_a_model_that_is_gone_at_a_restart_ends_the_process(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(
        monkeypatch,
        """
        if life == 1:
            channel.send(ready)
        else:
            channel.send(RankError('model_error', 'the file is gone'))
        """,
    )
    async with group_on(queue, redis_url) as group:
        with pytest.raises(ModelError, match="the file is gone") as caught:
            await asyncio.wait_for(group.running, 20)
    assert exit_code(caught.value) == ExitCode.UNUSABLE_FILE


@pytest.mark.parametrize("delay_s", [0.001, 60.0], ids=["while they load", "while it waits"])
async def test_a_group_without_ranks_stops_at_once(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", delay_s)
    ranks_that(
        monkeypatch,
        """
        if life == 1:
            channel.send(ready)
            time.sleep(0.3)
        else:
            time.sleep(60)
        """,
    )
    async with group_on(queue, redis_url) as group:
        await eventually(group.epochs)
        await eventually(lambda: is_no_member(group))
        started_s = time.monotonic()
        await group.stopped()
        assert time.monotonic() - started_s < 2.0


async def is_in_state(queue: QueueDriver, request_id: str, state: str) -> bool:
    return await queue.state(request_id) == state


async def is_member_again(group: Group, before: int) -> bool:
    return [epoch > before for epoch in await group.epochs()] == [True]


async def is_no_member(group: Group) -> bool:
    return not await group.epochs()
