"""Results are delivered to those who share them: each at least once, none to somebody else."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from producer.consumer import Consumer, Delivery
from producer.producer import Producer
from support.known_output import KnownOutput
from support.queue_driver import NAMESPACE, QueueDriver
from support.server_process import ServerProcess, restart_under
from wire.errors import WireError
from wire.ids import RequestId
from wire.keys import CONSUMERS
from wire.scripts import Scripts
from wire.streams import consumers

OUTPUT = KnownOutput(6)


async def next_delivery(consumer: Consumer) -> Delivery:
    async with asyncio.timeout(5):
        return await anext(aiter(consumer))


def consuming(url: str, **options: Any) -> Consumer:
    return Consumer(url, results="results", namespace=NAMESPACE, **options)


async def finish(queue: QueueDriver, *ids: str) -> None:
    await queue.join()
    await queue.assign(*ids)
    await queue.commit(*[OUTPUT.end(name, await queue.fence(name)) for name in ids])


# What is in a result


async def test_a_result_that_cannot_be_read_is_delivered_as_failed_and_stays_where_it_is(
    queue: QueueDriver, redis_url: str
) -> None:
    """It was written by another version, say. Whoever shares the results must know of it."""
    await queue.submit("a", "b")
    await finish(queue, "a", "b")
    record = queue.keys.request(RequestId("a"))
    await queue.client.hset(record, "result", b"\xc1 is not msgpack")
    async with consuming(redis_url) as consumer:
        deliveries = [await next_delivery(consumer) for _ in range(2)]
        by_id = {delivery.result.request_id: delivery for delivery in deliveries}
        assert by_id[RequestId("b")].result.text == OUTPUT.text
        unreadable = by_id[RequestId("a")].result
        assert unreadable.state == "failed"
        assert unreadable.error is not None
        assert unreadable.error.code == "wire_error"
        assert "'a' cannot be read" in unreadable.error.message
        for delivery in deliveries:
            await delivery.ack()
    assert (await queue.record("a"))["result"] == b"\xc1 is not msgpack"
    assert await queue.ended() == []
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        with pytest.raises(WireError, match="'a' cannot be read"):
            await producer.attach("a").result()


async def test_a_cancelled_request_is_delivered_with_what_it_had_generated(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.submit("a")
    await queue.join()
    await queue.assign("a")
    fence = await queue.fence("a")
    await queue.commit(OUTPUT.progress("a", fence, 0, 4))
    await queue.kill()
    await queue.reclaim()
    await queue.cancel("a")
    async with consuming(redis_url) as consumer:
        delivery = await next_delivery(consumer)
        assert delivery.result.token_ids == OUTPUT.token_ids[:4]
        assert delivery.result.text == OUTPUT.text_until(4)
        await delivery.ack()


# To whom it goes


async def test_each_result_goes_to_one_consumer_and_to_no_other_stream(
    queue: QueueDriver, redis_url: str
) -> None:
    ids = [f"{name}-{number}" for name in ("one", "other") for number in range(8)]
    async with (
        Producer(redis_url, namespace=NAMESPACE, results="one") as one,
        Producer(redis_url, namespace=NAMESPACE, results="other") as other,
        Consumer(redis_url, results="one", namespace=NAMESPACE) as first,
        Consumer(redis_url, results="one", namespace=NAMESPACE) as second,
        Consumer(redis_url, results="other", namespace=NAMESPACE) as third,
    ):
        handles = {
            name: await producer.submit("x", request_id=name)
            for producer, names in ((one, ids[:8]), (other, ids[8:]))
            for name in names
        }
        # The same ids again, from elsewhere: the first submission says where results go.
        for name in ids[:8]:
            await other.submit("y", request_id=name)
        await finish(queue, *ids[:8])
        await finish(queue, *ids[8:])
        seen: dict[Consumer, list[str]] = {first: [], second: [], third: []}

        async def consume(consumer: Consumer) -> None:
            async for delivery in consumer:
                seen[consumer].append(delivery.result.request_id)
                await delivery.ack()

        consuming_tasks = [asyncio.create_task(consume(consumer)) for consumer in seen]
        async with asyncio.timeout(10):
            while sum(map(len, seen.values())) < len(ids):
                await asyncio.sleep(0.01)
        for task in consuming_tasks:
            task.cancel()
        await asyncio.gather(*consuming_tasks, return_exceptions=True)
        assert Counter(seen[first] + seen[second]) == Counter(ids[:8])
        assert Counter(seen[third]) == Counter(ids[8:])
        # Who submitted it can read it as well, and takes it from nobody.
        for handle in handles.values():
            assert (await handle.result()).request_id == handle.request_id


async def test_a_late_acknowledgement_ends_its_own_delivery_and_no_other(
    queue: QueueDriver, redis_url: str
) -> None:
    """A consumer that was paused for too long wakes up when its result is somebody else's."""
    await queue.submit("a", "b")
    await finish(queue, "a", "b")
    async with consuming(redis_url, max_unacked=1, take_over_after_s=0.05) as sleeper:
        late = await next_delivery(sleeper)
        assert sleeper._keep_alive is not None
        sleeper._keep_alive.cancel()
        async with consuming(redis_url, take_over_after_s=0.05) as heir:
            taken = [await next_delivery(heir) for _ in range(2)]
            assert {delivery.result.request_id for delivery in taken} == {"a", "b"}
            await late.ack()
            assert await queue.ended() == [("b", "done")]
            for delivery in taken:
                await delivery.ack()
    assert await queue.ended() == []


async def test_a_result_is_delivered_again_until_its_acknowledgement_got_through(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after it was stored and before it was acknowledged: it comes to another one."""
    await queue.submit("a")
    await finish(queue, "a")
    consumer = consuming(redis_url, take_over_after_s=30)
    await consumer.__aenter__()
    await next_delivery(consumer)

    async def nothing(*_: Any) -> bool:
        return False

    monkeypatch.setattr(Scripts, "drop_consumer", nothing)  # it does not leave, it is gone
    await consumer.__aexit__(None, None, None)
    key = queue.keys.results("results")
    assert list((await consumers(queue.client, key, CONSUMERS)).values()) == [1]
    async with consuming(redis_url, take_over_after_s=0.01) as heir:
        delivery = await next_delivery(heir)
        assert delivery.result.text == OUTPUT.text
        await delivery.ack()
    assert await queue.ended() == []


# The server goes away


async def test_acknowledging_rides_out_a_restart(
    own_queue: QueueDriver, own_server: ServerProcess
) -> None:
    await own_queue.submit("a", "b")
    await finish(own_queue, "a", "b")
    async with consuming(own_server.url, max_unacked=1) as consumer:
        delivery = await next_delivery(consumer)
        own_server.kill()
        acking = asyncio.create_task(delivery.ack())
        await asyncio.sleep(0)
        await restart_under(own_queue.client, own_server)
        await acking
        other = await next_delivery(consumer)
        assert {delivery.result.request_id, other.result.request_id} == {"a", "b"}
        await other.ack()
    assert await own_queue.ended() == []


async def test_a_flushed_server_is_consumed_from_anew(queue: QueueDriver, redis_url: str) -> None:
    async with consuming(redis_url) as consumer:
        await queue.submit("a")
        await finish(queue, "a")
        await (await next_delivery(consumer)).ack()
        await queue.client.flushall()
        await queue.submit("b")
        await finish(queue, "b")
        await (await next_delivery(consumer)).ack()


async def test_a_lost_reply_to_an_acknowledgement_changes_nothing(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wire.streams import ack_and_delete

    num_lost = 1

    async def lossy(*args: Any) -> None:
        nonlocal num_lost
        await ack_and_delete(*args)
        if num_lost:
            num_lost -= 1
            raise RedisConnectionError("the reply was lost")

    monkeypatch.setattr("producer.consumer.ack_and_delete", lossy)
    await queue.submit("a", "b")
    await finish(queue, "a", "b")
    async with consuming(redis_url) as consumer:
        seen = [await next_delivery(consumer) for _ in range(2)]
        for delivery in seen:
            await delivery.ack()
    assert [delivery.result.request_id for delivery in seen] == ["a", "b"]
    assert await queue.ended() == []
