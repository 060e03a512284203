"""Reading a request's output from any position, exactly once, whatever happens to the journal."""

from __future__ import annotations

import asyncio

import pytest

from producer.handle import RequestHandle
from producer.position import StreamPosition
from producer.producer import Producer
from producer.sync import SyncProducer
from support.known_output import KnownOutput, assert_adds_up
from support.queue_driver import NAMESPACE, QueueDriver, end
from support.server_process import ServerProcess, restart_under
from wire.codec import encode
from wire.errors import (
    InvalidRequest,
    RequestCancelled,
    ResultGone,
    ServerUnreachable,
    WireError,
)
from wire.ids import RequestId
from wire.messages import Chunk

OUTPUT = KnownOutput(12, logprobs=True)


async def take(
    handle: RequestHandle, count: int, after: StreamPosition | None = None
) -> list[Chunk]:
    """The first chunks of a stream, which is then left."""
    chunks: list[Chunk] = []
    async for chunk in handle.stream(after):
        chunks.append(chunk)
        if len(chunks) == count:
            break
    return chunks


async def read_into(seen: list[Chunk], handle: RequestHandle) -> None:
    async for chunk in handle:
        seen.append(chunk)


async def run_until(queue: QueueDriver, request_id: str, *cuts: int) -> int:
    """Assign a request to a group and journal its output up to the last cut; returns the fence."""
    await queue.join()
    await queue.assign(request_id)
    fence = await queue.fence(request_id)
    for start, stop in zip((0, *cuts), cuts, strict=False):
        await queue.commit(OUTPUT.progress(request_id, fence, start, stop))
    return fence


# Going on elsewhere


async def test_another_process_goes_on_where_the_first_one_was(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as first:
        handle = await first.submit("x", request_id="a", stream=True)
        fence = await run_until(queue, "a", 2, 5)
        seen = await take(handle, 2)
    kept = StreamPosition.behind(seen[-1])
    assert kept == StreamPosition(5, len(OUTPUT.text_until(5)))
    async with Producer(redis_url, namespace=NAMESPACE) as second:
        rest = asyncio.create_task(take(second.attach("a"), 100, kept))
        await queue.commit(OUTPUT.progress("a", fence, 5, 9))
        await queue.commit(OUTPUT.progress("a", fence, 9, 12), OUTPUT.end("a", fence))
        seen += await rest
        assert_adds_up(seen, OUTPUT)
        assert (await second.attach("a").result()).text == OUTPUT.text


@pytest.mark.parametrize("stream", [True, False])
async def test_the_rest_of_a_request_that_has_ended_comes_from_its_result(
    queue: QueueDriver, redis_url: str, stream: bool
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=stream)
        fence = await run_until(queue, "a", 4, 8)
        seen = await take(handle, 1)
        await queue.commit(OUTPUT.end("a", fence))
        attached = producer.attach("a")
        rest = await take(attached, 100, StreamPosition.behind(seen[-1]))
        assert_adds_up(seen + rest, OUTPUT)
        assert rest[-1].logprobs is not None
        assert await take(attached, 100, StreamPosition.behind(rest[-1])) == []


async def test_a_reader_in_the_middle_of_a_journal_that_is_emptied_misses_nothing(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a")
        fence = await run_until(queue, "a", 4)
        stream = aiter(handle)
        seen = [await anext(stream)]
        await queue.commit(OUTPUT.progress("a", fence, 4, 8), OUTPUT.end("a", fence))
        seen += [chunk async for chunk in stream]
        assert_adds_up(seen, OUTPUT)


async def test_an_id_that_nobody_submitted_is_gone(queue: QueueDriver, redis_url: str) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = producer.attach("unknown")
        with pytest.raises(ResultGone, match="'unknown'"):
            await handle.result()
        with pytest.raises(ResultGone, match="'unknown'"):
            await take(handle, 1)
        await handle.cancel()
        with pytest.raises(InvalidRequest):
            producer.attach("a:b")


def test_the_synchronous_face_goes_on_too(redis_url: str) -> None:
    async def finish() -> None:
        from support.queue_driver import open_queue

        async with open_queue(redis_url) as queue:
            fence = await run_until(queue, "a", 4, 8)
            await queue.commit(OUTPUT.progress("a", fence, 8, 12), OUTPUT.end("a", fence))

    with SyncProducer(redis_url, namespace=NAMESPACE) as producer:
        producer.submit("x", request_id="a", stream=True)
        asyncio.run(finish())
        attached = producer.attach("a")
        first = next(attached.stream())
        rest = list(attached.stream(StreamPosition.behind(OUTPUT.chunk(0, 3))))
        assert_adds_up([OUTPUT.chunk(0, 3), *rest], OUTPUT)
        assert first.offset == 0


# Other groups, other cuts


async def test_a_request_that_goes_on_in_another_group_reads_on_seamlessly(
    queue: QueueDriver, redis_url: str
) -> None:
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        first_fence = await run_until(queue, "a", 3, 6)
        stream = aiter(handle)
        seen = [await anext(stream)]
        await queue.kill()
        assert await queue.reclaim() == (1, 0)
        await queue.join("heir")
        await queue.assign("a", group="heir")
        fence = await queue.fence("a")
        assert fence > first_fence
        await queue.commit(OUTPUT.progress("a", fence, 6, 10), group="heir")
        await queue.commit(
            OUTPUT.progress("a", fence, 10, 12), OUTPUT.end("a", fence), group="heir"
        )
        seen += [chunk async for chunk in stream]
        assert_adds_up(seen, OUTPUT)


async def test_what_a_cancelled_request_had_generated_comes_before_the_error(
    queue: QueueDriver, redis_url: str
) -> None:
    """It was cancelled between two attempts: nobody but the journal knows its tokens."""
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a")
        fence = await run_until(queue, "a", 3, 6)
        await queue.commit(end("a", fence, "retry"))
        await handle.cancel()
        outcome = await handle.outcome()
        assert (outcome.state, outcome.text) == ("cancelled", OUTPUT.text_until(6))
        assert list(outcome.token_ids) == list(OUTPUT.token_ids[:6])
        assert outcome.logprobs == OUTPUT.result("a").logprobs[:6]  # type: ignore[index]
        for reader in (handle, producer.attach("a")):
            seen: list[Chunk] = []
            with pytest.raises(RequestCancelled):
                await read_into(seen, reader)
            assert_adds_up(seen, outcome)


# The server goes away, and comes back with less


async def test_a_reader_rides_out_a_restart(
    own_queue: QueueDriver, own_server: ServerProcess
) -> None:
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        fence = await run_until(own_queue, "a", 3)
        stream = aiter(handle)
        seen = [await anext(stream)]
        upcoming = asyncio.ensure_future(anext(stream))
        own_server.kill()
        await asyncio.sleep(0)
        await restart_under(own_queue.client, own_server)
        own_server.command("SCRIPT", "FLUSH")
        await own_queue.commit(OUTPUT.progress("a", fence, 3, 6))
        seen.append(await upcoming)
        await own_queue.commit(OUTPUT.progress("a", fence, 6, 12), OUTPUT.end("a", fence))
        seen += [chunk async for chunk in stream]
        assert_adds_up(seen, OUTPUT)


async def test_a_journal_that_the_server_lost_a_part_of_is_waited_for_to_catch_up(
    own_queue: QueueDriver, own_server: ServerProcess
) -> None:
    """What is generated again is cut in other places, and under another fence."""
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        await run_until(own_queue, "a", 3)
        durable_size = own_server.aof_size()
        await own_queue.commit(OUTPUT.progress("a", await own_queue.fence("a"), 3, 8))
        stream = aiter(handle)
        seen = [await anext(stream), await anext(stream)]
        assert seen[-1] == OUTPUT.chunk(3, 8)
        upcoming = asyncio.ensure_future(anext(stream))

        own_server.kill()
        own_server.truncate_aof(own_server.aof_size() - durable_size)
        await restart_under(own_queue.client, own_server)
        assert (await own_queue.record("a"))["num_journaled"] == b"3"
        await own_queue.kill()
        await own_queue.reclaim()
        await own_queue.join("heir")
        await own_queue.assign("a", group="heir")
        fence = await own_queue.fence("a")
        for start, stop in ((3, 4), (4, 7), (7, 10)):
            await own_queue.commit(OUTPUT.progress("a", fence, start, stop), group="heir")
        seen.append(await upcoming)
        assert seen[-1] == OUTPUT.chunk(8, 10, fence=fence)
        await own_queue.commit(
            OUTPUT.progress("a", fence, 10, 12), OUTPUT.end("a", fence), group="heir"
        )
        seen += [chunk async for chunk in stream]
        assert_adds_up(seen, OUTPUT)


async def test_a_server_whose_clock_was_set_back_is_read_from_the_beginning(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry ids are times: what is new then stands before what the reader has."""
    monkeypatch.setattr("producer.reconciling.CHECK_AFTER_S", 0.05)
    key = queue.keys.journal(RequestId("a"))
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        fence = await run_until(queue, "a", 5)
        stream = aiter(handle)
        seen = [await anext(stream)]
        await queue.client.delete(key)
        for number, cut in enumerate(((0, 2), (2, 9)), start=1):
            await queue.client.xadd(key, {"chunk": encode(OUTPUT.chunk(*cut))}, id=f"1-{number}")
        await queue.client.pexpire(key, 60_000)
        await queue.client.hset(queue.keys.request(RequestId("a")), "num_journaled", "9")
        seen.append(await asyncio.wait_for(anext(stream), 5))
        await queue.commit(OUTPUT.end("a", fence))
        seen += [chunk async for chunk in stream]
        assert_adds_up(seen, OUTPUT)


async def test_a_reader_that_ran_out_of_patience_goes_on_from_its_position(
    own_queue: QueueDriver, own_server: ServerProcess
) -> None:
    async with Producer(own_server.url, namespace=NAMESPACE, patience_s=0.2) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        fence = await run_until(own_queue, "a", 4)
        stream = aiter(handle)
        seen = [await anext(stream)]
        own_server.kill()
        with pytest.raises(ServerUnreachable):
            await anext(stream)
        await restart_under(own_queue.client, own_server)
        await own_queue.commit(OUTPUT.progress("a", fence, 4, 8), OUTPUT.end("a", fence))
        seen += await take(handle, 100, StreamPosition.behind(seen[-1]))
        assert_adds_up(seen, OUTPUT)


async def test_a_journal_with_a_hole_is_an_error(queue: QueueDriver, redis_url: str) -> None:
    """The scripts write none; should one be there nevertheless, nobody reads over it."""
    key = queue.keys.journal(RequestId("a"))
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handle = await producer.submit("x", request_id="a", stream=True)
        for cut in ((0, 3), (4, 6)):
            await queue.client.xadd(key, {"chunk": encode(OUTPUT.chunk(*cut))})
        await queue.client.pexpire(key, 60_000)
        seen: list[Chunk] = []
        with pytest.raises(WireError, match="goes on with token 4"):
            await read_into(seen, handle)
        assert seen == [OUTPUT.chunk(0, 3)]


# A slow consumer


async def test_a_reader_that_stops_asking_costs_nothing_and_holds_up_nobody(
    queue: QueueDriver, redis_url: str
) -> None:
    long = KnownOutput(900)
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handles = {
            name: await producer.submit("x", request_id=name, stream=True)
            for name in ("slow", "quick", "other")
        }
        await queue.join()
        await queue.assign(*handles)
        fences = {name: await queue.fence(name) for name in handles}
        others = [asyncio.create_task(take(handles[name], 900)) for name in ("quick", "other")]
        slow = aiter(handles["slow"])
        for start in range(0, 900, 3):
            await queue.commit(
                *(long.progress(name, fences[name], start, start + 3) for name in handles)
            )
            if start == 0:
                seen = [await anext(slow)]
        await queue.commit(*(long.end(name, fences[name]) for name in handles))
        for other in others:
            assert_adds_up(await other, long)
        # The slow one has asked for one chunk: nothing more is held for it, or asked of the server.
        reader = producer._queue._reader
        assert queue.keys.journal(RequestId("slow")) not in reader._waiting
        assert queue.keys.journal(RequestId("slow")) not in (reader._reading or {})
        assert_adds_up(seen + [chunk async for chunk in slow], long)
