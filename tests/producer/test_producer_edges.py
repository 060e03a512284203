"""The producer's and the consumer's promises where something is lost or odd, on real servers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

import producer.completions
from producer.consumer import Consumer
from producer.outcomes import fetch_results
from producer.producer import Producer
from producer.stream_reader import StreamReader
from support.queue_driver import NAMESPACE, QueueDriver, end, tokens
from wire.client import connect
from wire.errors import InvalidRequest, ServerUnreachable
from wire.ids import RequestId
from wire.keys import CONSUMERS
from wire.messages import Prompt, Request
from wire.scripts import Scripts
from wire.streams import START, consumers


@pytest.fixture
async def blocking(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url, blocking=True)
    yield client
    await client.aclose()


async def finish(queue: QueueDriver, request_id: str) -> None:
    await queue.assign(request_id)
    await queue.commit(end(request_id, await queue.fence(request_id)))


# What is refused before it is sent


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": "half a pair: \ud800"}, None),
        ({"prompt": "x", "tenant": "\udfff"}, None),
        ({"prompt": "x", "priority": "urgent"}, "priority"),
        ({"prompt": "x", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "x", "timeout_s": float("nan")}, "timeout_s"),
        ({"prompt": "x", "request_id": "a:b"}, "request_id"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
    ],
)
async def test_what_nobody_could_serve_is_refused_at_once(
    queue: QueueDriver, redis_url: str, options: dict[str, Any], field: str | None
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as submitting:
        with pytest.raises(InvalidRequest) as caught:
            await submitting.submit(**options)
    assert caught.value.field == field
    assert await queue.client.keys("*request*") == []


async def test_a_batch_of_submissions_is_bounded_in_bytes(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one command, and must get through within a command's timeout."""
    monkeypatch.setattr("producer.many.MAX_BATCH_BYTES", 5000)
    sizes: list[int] = []
    original = Scripts.submit

    async def submit(self: Scripts, submissions: Any, **options: Any) -> Any:
        sizes.append(sum(len(item.message) for item in submissions))
        return await original(self, submissions, **options)

    monkeypatch.setattr(Scripts, "submit", submit)
    requests = [Request(RequestId(str(n)), Prompt(text="x" * 1000)) for n in range(30)]
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        results = producer.submit_many(requests)
        waiting = asyncio.ensure_future(anext(results))
        while await queue.state("29") is None:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert sum(sizes) > 30_000
    assert max(sizes) < 5000 + 1100


# Results


async def test_a_result_survives_a_lost_reply(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`patience_s` covers every call, also the one that fetches a result once it is there."""
    failures = 2

    async def flaky(*args: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise RedisConnectionError("the reply was lost")
        return await fetch_results(*args)

    monkeypatch.setattr(producer.completions, "fetch_results", flaky)
    await queue.join()
    async with Producer(redis_url, namespace=NAMESPACE) as submitting:
        handle = await submitting.submit("Hi", request_id="a")
        await finish(queue, "a")
        assert (await handle.result()).text == "by 1"
        failures = 2
        again = await submitting.submit("Hi", request_id="a")
        assert (await again.result()).text == "by 1"


async def test_patience_ends(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*args: Any) -> Any:
        raise RedisConnectionError("away")

    await queue.join()
    async with Producer(redis_url, namespace=NAMESPACE, patience_s=0.01) as submitting:
        handle = await submitting.submit("Hi", request_id="a")
        with monkeypatch.context() as patch:
            patch.setattr(producer.completions, "fetch_results", away)
            await finish(queue, "a")
            with pytest.raises(ServerUnreachable):
                await handle.result()
        assert (await handle.result()).text == "by 1", "asked again later"


async def test_a_second_reader_of_a_stream_need_not_wait_for_the_first(
    queue: QueueDriver, redis_url: str, blocking: Redis
) -> None:
    """It begins further back than the read that is blocked at the moment."""
    await queue.join()
    await queue.submit("a", stream=True)
    await queue.assign("a")
    await queue.commit(tokens("a", 1, 0, 5))
    key = queue.keys.journal(RequestId("a"))
    reader = StreamReader(queue.client, blocking, redis_url, queue.keys.bell("p"), patience_s=1)
    running = asyncio.create_task(reader.run())
    [(last, _)] = await reader.next_entries(key, START)
    ahead = reader.next_entries(key, last)
    while not (await queue.client.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.01)
    [(entry_id, _)] = await asyncio.wait_for(reader.next_entries(key, START), 2)
    assert entry_id == last
    assert not ahead.done()
    await queue.commit(end("a", 1))
    assert len(await ahead) == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# Consumers


async def test_a_result_in_a_reply_that_was_never_seen_is_not_lost(
    queue: QueueDriver, redis_url: str
) -> None:
    """The consumer leaves right after: what is pending for it must go to another one."""
    await queue.submit("a")
    async with Consumer(redis_url, results="results", namespace=NAMESPACE) as first:
        await queue.cancel("a")
        await first._read(10)
    key = queue.keys.results("results")
    assert list((await consumers(queue.client, key, CONSUMERS)).values()) == [1]
    async with Consumer(
        redis_url, results="results", namespace=NAMESPACE, take_over_after_s=0.01
    ) as second:
        async for delivery in second:
            assert delivery.result.request_id == "a"
            await delivery.ack()
            break
    assert await queue.ended() == []


async def test_a_result_that_could_not_be_fetched_comes_again(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 1

    async def flaky(*args: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise RedisConnectionError("the reply was lost")
        return await fetch_results(*args)

    monkeypatch.setattr("producer.consumer.fetch_results", flaky)
    await queue.submit("a")
    await queue.cancel("a")
    async with Consumer(
        redis_url, results="results", namespace=NAMESPACE, take_over_after_s=0.1, max_unacked=1
    ) as consumer:
        async for delivery in consumer:
            assert delivery.result.state == "cancelled"
            await delivery.ack()
            break


async def test_a_consumer_that_owes_nothing_leaves_nothing(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Consumer(redis_url, results="results", namespace=NAMESPACE) as consumer:
        await queue.submit("a")
        await queue.cancel("a")
        async for delivery in consumer:
            await delivery.ack()
            break
    assert await consumers(queue.client, queue.keys.results("results"), CONSUMERS) == {}


async def test_an_iteration_that_was_left_goes_on_with_the_next(
    queue: QueueDriver, redis_url: str
) -> None:
    """What was read ahead is not lost, nor does it take the room of what comes."""
    for name in "abc":
        await queue.submit(name)
        await queue.cancel(name)
    seen: set[str] = set()
    async with Consumer(
        redis_url, results="results", namespace=NAMESPACE, max_unacked=3
    ) as consumer:
        for _ in range(3):
            async with asyncio.timeout(5):
                async for delivery in consumer:
                    seen.add(delivery.result.request_id)
                    await delivery.ack()
                    break
    assert seen == {"a", "b", "c"}
    assert await queue.ended() == []


async def test_a_result_that_is_gone_takes_no_room(queue: QueueDriver, redis_url: str) -> None:
    for name in "ab":
        await queue.submit(name)
        await queue.cancel(name)
    await queue.client.delete(queue.keys.request(RequestId("a")))
    async with Consumer(
        redis_url, results="results", namespace=NAMESPACE, max_unacked=1
    ) as consumer:
        async with asyncio.timeout(5):
            async for delivery in consumer:
                assert delivery.result.request_id == "b"
                await delivery.ack()
                break
    assert await queue.ended() == []


# Leaving


async def test_leaving_while_the_server_is_away_is_not_held_up(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.many.LEAVING_PATIENCE_S", 0.1)

    async def unreachable(*args: Any) -> Any:
        raise RedisConnectionError("nobody listens")

    async with Producer(redis_url, namespace=NAMESPACE, patience_s=60) as producer:
        results = producer.submit_many([Request(RequestId("a"), Prompt(text="x"))])
        waiting = asyncio.ensure_future(anext(results))
        while await queue.state("a") is None:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(Scripts, "cancel", unreachable)
        waiting.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(ServerUnreachable):
                await waiting


def test_an_interrupted_synchronous_iteration_ends_as_interrupted(redis_url: str) -> None:
    program = f"""
import os, signal, threading
from forebay import Prompt, Request, SyncProducer

def requests():
    for number in range(20):
        yield Request(str(number), Prompt(text="x"))
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

try:
    with SyncProducer({redis_url!r}, namespace={NAMESPACE!r}) as producer:
        for _ in producer.submit_many(requests()):
            pass
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
