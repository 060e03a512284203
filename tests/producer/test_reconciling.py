"""Nobody waits for ever: servers that lose records, streams and replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from producer.completions import Completions
from producer.handle import RequestHandle
from producer.outcomes import fetch_results
from producer.producer import Producer
from producer.reconciling import Reconciler
from support.known_output import KnownOutput, assert_adds_up
from support.queue_driver import NAMESPACE, QueueDriver
from support.server_process import ServerProcess, restart_under
from wire.errors import ForebayError, ResultGone, ServerUnreachable
from wire.ids import RequestId
from wire.messages import Prompt, Request, Result
from wire.scripts import Scripts
from wire.streams import entries

OUTPUT = KnownOutput(6)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for is looked up soon."""
    monkeypatch.setattr("producer.reconciling.CHECK_AFTER_S", 0.05)


def requests(*ids: str) -> list[Request]:
    return [Request(RequestId(name), Prompt(text="x")) for name in ids]


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def until_waited_for(producer: Producer, num_waits: int) -> None:
    async with asyncio.timeout(10):
        while len(producer._queue._reconciler._waits) < num_waits:
            await asyncio.sleep(0.01)


async def finish(queue: QueueDriver, *ids: str) -> None:
    """A group takes requests and ends them."""
    await queue.join()
    await queue.assign(*ids)
    await queue.commit(*[OUTPUT.end(name, await queue.fence(name)) for name in ids])


async def collect(results: AsyncIterator[Result]) -> list[Result]:
    return [result async for result in results]


# The record is lost


async def stream_of(handle: RequestHandle) -> None:
    async for _ in handle:
        pass


@pytest.mark.usefixtures("quickly")
async def test_whoever_waits_for_a_request_that_the_server_lost_is_told(
    queue: QueueDriver, redis_url: str
) -> None:
    async with (
        Producer(redis_url, namespace=NAMESPACE) as own,
        Producer(redis_url, namespace=NAMESPACE, results="shared") as sharing,
    ):
        handle = await own.submit("x", request_id="a")
        shared = await sharing.submit("x", request_id="b")
        waiting = [
            asyncio.ensure_future(work)
            for work in (
                handle.result(),
                stream_of(handle),
                own.attach("a").result(),
                stream_of(own.attach("a")),
                shared.result(),
                stream_of(shared),
            )
        ]
        await until_waited_for(own, 4)
        await until_waited_for(sharing, 2)
        await queue.client.flushall()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        for outcome in outcomes:
            assert isinstance(outcome, ResultGone)
            assert "submit it again" in str(outcome)
        again = await own.submit("x", request_id="a")
        await finish(queue, "a")
        assert (await again.result()).text == OUTPUT.text


async def test_what_a_restarted_server_lost_is_submitted_again(
    own_queue: QueueDriver, own_server: ServerProcess
) -> None:
    """Long before the next look: the server was away, which is a reason to look at once."""
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        waiting = asyncio.create_task(collect(producer.submit_many(requests("a", "b", "c"))))
        single = await producer.submit("x", request_id="kept")
        lost = asyncio.create_task(single.result())
        await until(lambda: own_queue.state("c"))
        await finish(own_queue, "b")
        await until(lambda: _is_read(own_queue))
        own_server.kill()
        own_server.truncate_aof(own_server.aof_size())
        await restart_under(own_queue.client, own_server)
        async with asyncio.timeout(4):
            await until(lambda: own_queue.state("a"))
            await until(lambda: own_queue.state("c"))
            await finish(own_queue, "a", "c")
            results = await waiting
            with pytest.raises(ResultGone):
                await lost
        assert sorted(result.request_id for result in results) == ["a", "b", "c"]
        assert {result.text for result in results} == {OUTPUT.text}


async def _is_read(queue: QueueDriver) -> bool:
    """Whether the producer has dealt with all that its results stream has told it."""
    names = [cast("bytes", name).decode() for name in await queue.client.keys("*:results:*")]
    return bool(names) and not any([await entries(queue.client, name) for name in names])


@pytest.mark.usefixtures("quickly")
async def test_a_request_that_is_lost_again_and_again_fails_in_the_end(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.many.MAX_SUBMISSIONS", 3)
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        waiting = asyncio.create_task(collect(producer.submit_many(requests("a"))))
        for _ in range(3):
            await until(lambda: queue.state("a"))
            await queue.client.flushall()
        [result] = await asyncio.wait_for(waiting, 5)
    assert result.state == "failed"
    assert result.error is not None
    assert result.error.code == "result_gone"


# What tells of the end is lost


@pytest.mark.usefixtures("quickly")
async def test_a_result_is_found_though_the_results_stream_lost_it(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> None:
        return

    monkeypatch.setattr(Completions, "_resolve", nothing)
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        waiting = asyncio.create_task(collect(producer.submit_many(requests("a", "b"))))
        await until(lambda: queue.state("b"))
        await finish(queue, "a", "b")
        results = await asyncio.wait_for(waiting, 5)
    assert {result.request_id: result.text for result in results} == dict.fromkeys(
        ("a", "b"), OUTPUT.text
    )


@pytest.mark.usefixtures("quickly")
async def test_a_result_is_found_though_the_journal_is_gone(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        await producer.submit("x", request_id="a", stream=True)
        await queue.join()
        await queue.assign("a")
        fence = await queue.fence("a")
        await queue.commit(OUTPUT.progress("a", fence, 0, 3))
        result = asyncio.ensure_future(producer.attach("a").result())
        stream = aiter(producer.attach("a"))
        seen = [await anext(stream)]
        rest = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        async with queue.client.pipeline(transaction=True) as pipe:
            # The end comes and goes before anybody can read it.
            await queue.commit(OUTPUT.end("a", fence))
            pipe.delete(queue.keys.journal(RequestId("a")))
            await pipe.execute()
        assert (await asyncio.wait_for(result, 5)).text == OUTPUT.text
        assert_adds_up([*seen, await asyncio.wait_for(rest, 5)], OUTPUT)


async def test_those_that_were_looked_up_longest_ago_are_looked_up_first(
    queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many wait, a look costs a bounded number of commands."""
    monkeypatch.setattr("producer.reconciling.CHECK_AFTER_S", 0.0)
    monkeypatch.setattr("producer.reconciling.PAGE", 2)
    monkeypatch.setattr("producer.reconciling.MAX_AT_A_TIME", 3)
    reconciler = Reconciler(queue.client, queue.keys)
    alerted: list[str] = []
    watches = [
        reconciler.watch(RequestId(name), lambda name=name: alerted.append(name))  # type: ignore[misc]
        for name in "abcd"
    ]
    for watch in watches:
        watch.__enter__()
    await reconciler._check(3)
    assert alerted == ["a", "b", "c"]
    await reconciler._check(3)
    assert alerted == ["a", "b", "c", "d", "a", "b"]
    await reconciler._check(None)
    assert alerted[6:] == ["c", "d", "a", "b"]
    for watch in watches:
        watch.__exit__(None, None, None)


# A reply is lost


async def leave(results: AsyncIterator[Result]) -> None:
    """Ask for one more result, and then no more."""
    upcoming = asyncio.ensure_future(anext(results))
    await asyncio.sleep(0)
    upcoming.cancel()
    await asyncio.gather(upcoming, return_exceptions=True)


@pytest.fixture
def lost_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first submission is carried out, and nobody hears of it."""
    original = Scripts.submit
    num_lost = 1

    async def submit(*args: Any, **options: Any) -> Any:
        nonlocal num_lost
        outcomes = await original(*args, **options)
        if num_lost:
            num_lost -= 1
            raise RedisConnectionError("the reply was lost")
        return outcomes

    monkeypatch.setattr(Scripts, "submit", submit)


@pytest.mark.usefixtures("lost_reply")
async def test_a_submission_whose_reply_was_lost_is_still_ours(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        results = producer.submit_many(requests("a", "b"), forget=True)
        first = asyncio.ensure_future(anext(results))
        await until(lambda: queue.state("b"))
        await finish(queue, "a")
        assert (await first).request_id == "a"
        await leave(results)
        assert await queue.state("a") is None, "forgotten"
        assert await queue.state("b") == "cancelled"


async def test_a_request_of_somebody_else_is_neither_deleted_nor_cancelled(
    queue: QueueDriver, redis_url: str
) -> None:
    async with (
        Producer(redis_url, namespace=NAMESPACE) as owner,
        Producer(redis_url, namespace=NAMESPACE) as other,
    ):
        handles = [await owner.submit("x", request_id=name) for name in "ab"]
        results = other.submit_many(requests("a", "b"), forget=True)
        first = asyncio.ensure_future(anext(results))
        await finish(queue, "a")
        assert (await first).request_id == "a"
        await leave(results)
        assert (await handles[0].result()).text == OUTPUT.text
        assert (await other.attach("a").result()).text == OUTPUT.text
        assert await queue.state("b") == "queued"
        await finish(queue, "b")
        assert (await handles[1].result()).text == OUTPUT.text


# The own results stream


async def test_no_entry_is_left_behind_by_an_absence_of_the_server(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unread entries hold the intake back: one that nobody will ever read would do so for good."""
    is_away = True

    async def flaky(*args: Any) -> Any:
        if is_away:
            raise RedisConnectionError("away")
        return await fetch_results(*args)

    monkeypatch.setattr("producer.completions.fetch_results", flaky)
    async with Producer(redis_url, namespace=NAMESPACE, patience_s=0.01) as producer:
        handle = await producer.submit("x", request_id="a")
        await finish(queue, "a")
        with pytest.raises(ServerUnreachable):
            await handle.result()
        is_away = False
        assert (await handle.result()).text == OUTPUT.text
        await until(lambda: _is_read(queue))


async def test_results_are_heard_of_though_the_clock_was_set_back(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        first = await producer.submit("x", request_id="a")
        second = await producer.submit("x", request_id="b")
        await finish(queue, "a")
        await first.result()
        await until(lambda: _is_read(queue))
        [name] = await queue.client.keys("*:results:*")
        await queue.client.delete(name)
        await queue.client.xadd(name, {"request_id": "b", "state": "done"}, id="1-1")
        await queue.client.pexpire(name, 60_000)
        await finish(queue, "b")
        await queue.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert (await asyncio.wait_for(second.result(), 4)).text == OUTPUT.text
        await until(lambda: _is_read(queue))


async def test_closing_ends_every_wait(queue: QueueDriver, redis_url: str) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a")
        waiting = [
            asyncio.ensure_future(work)
            for work in (handle.result(), producer.attach("a").result(), stream_of(handle))
        ]
        await until_waited_for(producer, 3)
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert all(isinstance(outcome, ForebayError) for outcome in outcomes)
