"""Requests through producer, scheduler, worker group and consumer: separate processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from redis.asyncio import Redis

from pipeline.conftest import SCHEDULER, SLOW, STUB, Services
from producer import Consumer, Producer, SyncProducer
from wire.errors import IntakeFull, RequestCancelled, RequestExpired, RequestFailed
from wire.ids import RequestId
from wire.messages import Prompt, Request
from wire.sampling import SamplingParams


def echo(index: int, *, max_tokens: int = 12) -> Request:
    """A request that the stub engine answers with its own beginning."""
    return Request(
        RequestId(f"request-{index}"),
        Prompt(text=f"{index} is the number"),
        SamplingParams(max_tokens=max_tokens),
    )


LONG = SamplingParams(max_tokens=1500, min_tokens=1500, ignore_eos=True)


async def test_two_thousand_requests_are_answered_once_each_and_right(
    pipeline: Services, redis_url: str
) -> None:
    answers: Counter[str] = Counter()
    async with Producer(redis_url) as producer:
        requests = [echo(index) for index in range(2000)]
        async for result in producer.submit_many(requests, forget=True):
            assert result.state == "done"
            assert result.text == requests[int(result.request_id.split("-")[1])].prompt.text[:12]  # type: ignore[index]
            answers[result.request_id] += 1
    assert answers == Counter(request.request_id for request in requests)


async def test_two_thousand_results_are_shared_by_two_consumers(
    pipeline: Services, redis_url: str
) -> None:
    shared: list[str] = []
    enough = asyncio.Event()

    async def consume(consumer: Consumer) -> None:
        async for delivery in consumer:
            shared.append(delivery.result.request_id)
            await delivery.ack()
            if len(shared) == 2000:
                enough.set()

    async with (
        Consumer(redis_url, results="run-1") as one,
        Consumer(redis_url, results="run-1") as other,
        Producer(redis_url, results="run-1") as producer,
    ):
        consuming = [asyncio.create_task(consume(consumer)) for consumer in (one, other)]
        handles = [
            await producer.submit(request_id=f"request-{index}", prompt=f"{index} is the number")
            for index in range(2000)
        ]
        await asyncio.wait_for(enough.wait(), 60)
        for task in consuming:
            task.cancel()
        await asyncio.gather(*consuming, return_exceptions=True)
    assert Counter(shared) == Counter(handle.request_id for handle in handles)
    async with Redis.from_url(redis_url) as client:
        assert await client.xlen("{forebay:0}:results:run-1") == 0


async def test_what_a_consumer_left_unacknowledged_goes_to_another(
    pipeline: Services, redis_url: str
) -> None:
    async with Producer(redis_url, results="run-2") as producer:
        handle = await producer.submit("kept by the dead", sampling=SamplingParams(max_tokens=4))
        async with Consumer(redis_url, results="run-2") as dies:
            async for delivery in dies:
                assert delivery.result.request_id == handle.request_id
                break
        async with Consumer(redis_url, results="run-2", take_over_after_s=0.2) as takes_over:
            async for delivery in takes_over:
                assert delivery.result.text == "kept"
                await delivery.ack()
                break
        # The producer's own handle works beside its consumers.
        assert (await handle.result()).text == "kept"


async def test_tokens_stream_in_order_and_add_up(pipeline: Services, redis_url: str) -> None:
    async with Producer(redis_url) as producer:
        handle = await producer.submit("stream this text", stream=True)
        chunks = [chunk async for chunk in handle]
        result = await handle.result()
    assert "".join(chunk.text for chunk in chunks) == result.text == "stream this text"
    assert [token for chunk in chunks for token in chunk.token_ids] == list(result.token_ids)


async def test_a_request_that_does_not_stream_can_be_iterated_too(
    pipeline: Services, redis_url: str
) -> None:
    prompt = "all of it, in one piece or in several, but once"
    async with Producer(redis_url) as producer:
        handle = await producer.submit(prompt)
        assert "".join([chunk.text async for chunk in handle]) == prompt
        assert "".join([chunk.text async for chunk in handle]) == prompt


async def test_the_same_id_is_the_same_request(pipeline: Services, redis_url: str) -> None:
    async with Producer(redis_url) as one, Producer(redis_url) as other:
        first = await one.submit("the first", request_id="mine")
        second = await other.submit("the second", request_id="mine")
        assert (await second.result()).text == (await first.result()).text == "the first"
        third = await other.submit("the third", request_id="mine")
        assert (await third.result()).text == "the first"


async def test_a_running_request_is_cancelled_and_keeps_what_it_has(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    services.start(*SLOW)
    async with Producer(redis_url) as producer:
        handle = await producer.submit("endless", sampling=LONG, stream=True)
        async for _ in handle:
            await handle.cancel()
            break
        with pytest.raises(RequestCancelled):
            await handle.result()
        assert 0 < len((await handle.outcome()).token_ids) < 1500
        await handle.cancel()  # too late, and harmless


async def test_a_queued_request_is_cancelled_at_once(redis_url: str) -> None:
    async with Producer(redis_url) as producer:
        handle = await producer.submit("nobody is there")
        await handle.cancel()
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(handle.result(), 10)


async def test_a_deadline_ends_a_running_and_a_queued_request(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    async with Producer(redis_url) as producer:
        queued = await producer.submit("too late", timeout_s=0.01)
        services.start(*STUB, group_id="only")
        with pytest.raises(RequestExpired, match="queued"):
            await queued.result()
        # The stub takes microseconds a step: keep it busy with a prompt that it cannot end soon.
        running = [await producer.submit("slow", sampling=LONG, timeout_s=0.05) for _ in range(100)]
        states = {(await handle.outcome()).state for handle in running}
        assert "expired" in states


async def test_what_cannot_be_served_fails_with_a_reason(
    pipeline: Services, redis_url: str
) -> None:
    async with Producer(redis_url) as producer:
        too_long = await producer.submit("x" * 5000)
        with pytest.raises(RequestFailed, match="5000 tokens") as caught:
            await too_long.result()
        assert caught.value.reason == "context_length_exceeded"
        unknown = await producer.submit("x", model="gpt-17")
        with pytest.raises(RequestFailed, match="'gpt-17' is not served"):
            await unknown.result()
        assert (await (await producer.submit("good")).result()).text == "good"


async def test_a_full_intake_refuses_at_once_or_waits(services: Services, redis_url: str) -> None:
    async with Producer(redis_url, max_queued=2) as producer:
        handles = [await producer.submit("queued") for _ in range(2)]
        with pytest.raises(IntakeFull, match="limit of 2"):
            await producer.submit("one too many")
        waiting = asyncio.create_task(producer.submit("patient", wait=True))
        services.start(*SCHEDULER)
        services.start(*STUB)
        handles.append(await asyncio.wait_for(waiting, 30))
        assert [(await handle.result()).text for handle in handles] == [
            "queued",
            "queued",
            "patient",
        ]


async def test_leaving_submit_many_early_cancels_the_rest(
    pipeline: Services, redis_url: str
) -> None:
    requests = [Request(RequestId(f"long-{index}"), Prompt(text="x"), LONG) for index in range(300)]
    async with Producer(redis_url) as producer:
        results = producer.submit_many(requests, max_in_flight=200)
        first = await anext(results)
        await results.aclose()  # type: ignore[attr-defined]
        ended = [
            await (await producer.submit("x", request_id=request.request_id)).outcome()
            for request in requests[:5]
        ]
    assert first.state == "done"
    assert {result.state for result in ended} <= {"done", "cancelled"}


async def test_a_killed_group_s_requests_go_on_elsewhere(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    doomed = services.start(*SLOW, group_id="doomed", group_timeout_ms=500, heartbeat_ms=100)
    async with Producer(redis_url) as producer:
        handles = [
            await producer.submit(
                "on and on",
                sampling=SamplingParams(max_tokens=1900, min_tokens=1900, ignore_eos=True),
                stream=True,
            )
            for _ in range(64)
        ]
        streams = [asyncio.create_task(_collect(handle)) for handle in handles]
        services.wait_for_log(doomed, "group joined")
        await anext(handles[0].__aiter__())
        services.end(doomed, signal.SIGKILL)
        services.start(*STUB, group_id="heir")
        collected = await asyncio.gather(*streams)
        for handle, (offsets, tokens) in zip(handles, collected, strict=True):
            result = await handle.result()
            assert tokens == list(result.token_ids)
            assert offsets == sorted(set(offsets))
            assert len(tokens) == 1900


async def test_a_group_that_ends_in_order_gives_its_requests_back(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    leaver = services.start(*SLOW, group_id="leaver", drain_timeout_s=0.01)
    async with Producer(redis_url) as producer:
        handles = [await producer.submit("again", sampling=LONG) for _ in range(64)]
        services.wait_for_log(leaver, "group joined")
        assert services.end(leaver) == 0
        services.start(*STUB, group_id="stayer")
        for handle in handles:
            assert len((await handle.result()).token_ids) == 1500


async def test_a_killed_scheduler_s_requests_are_taken_over(
    services: Services, redis_url: str
) -> None:
    # Without a group, the first scheduler can only read and hold.
    doomed = services.start(*SCHEDULER)
    async with Producer(redis_url) as producer:
        handles = [await producer.submit(f"held {index}") for index in range(20)]
        services.wait_for_log(doomed, "scheduler started")
        async with Redis.from_url(redis_url) as client:
            while not await client.xpending("{forebay:0}:intake:standard", "schedulers"):
                await asyncio.sleep(0.01)
        services.end(doomed, signal.SIGKILL)
        services.start(*SCHEDULER)
        services.start(*STUB)
        answers = [(await handle.result()).text for handle in handles]
    assert answers == [f"held {index}" for index in range(20)]


async def test_a_rank_that_dies_while_its_group_is_idle_is_replaced(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    group = services.start(*STUB)
    services.wait_for_log(group, "group joined")
    [rank] = [
        int(pid) for pid in Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    ]
    os.kill(rank, signal.SIGKILL)
    services.wait_for_log(group, f"rank 0 (pid {rank}) was killed by SIGKILL")
    async with Producer(redis_url) as producer:
        assert (await (await producer.submit("after all")).result()).text == "after all"


def test_scripts_can_use_the_synchronous_face(pipeline: Services, redis_url: str) -> None:
    with SyncProducer(redis_url) as producer:
        handle = producer.submit("no await in sight", stream=True)
        assert "".join(chunk.text for chunk in handle) == "no await in sight"
        assert handle.result().finish_reason == "stop"
        texts = {result.text for result in producer.submit_many(echo(i) for i in range(50))}
        assert texts == {f"{i} is the number"[:12] for i in range(50)}


def test_a_reader_that_has_enough_of_an_answer_ends_its_request(
    pipeline: Services, redis_url: str
) -> None:
    command = [sys.executable, "-m", "forebay", "submit", "--stream", "--redis", redis_url, "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"x" * 2000)
        process.stdin.close()
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == b""


async def test_nothing_but_expiring_keys_is_left_after_a_normal_end(
    pipeline: Services, redis_url: str
) -> None:
    async with Producer(redis_url) as producer:
        async for _ in producer.submit_many([echo(i) for i in range(100)], forget=True):
            pass
    pipeline.end_all()
    async with Redis.from_url(redis_url) as client:
        left = {key async for key in client.scan_iter()}
        assert all([await client.pttl(key) > 0 for key in left])
    kinds = {key.decode().split(":")[2] for key in left}
    assert kinds <= {"salt", "intake", "epoch", "model", "bell", "results"}


async def _collect(handle: object) -> tuple[list[int], list[int]]:
    offsets, tokens = [], []
    async for chunk in handle:  # type: ignore[attr-defined]
        offsets.append(chunk.offset)
        tokens += chunk.token_ids
    return offsets, tokens
