"""Failures that other queues for batch inference have described of themselves, tried on this one.

Each test is named after a failure that a peer's fault harness or specification shows, says in its
docstring what goes wrong there, and shows why it does not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest
from redis.asyncio import Redis

from pipeline.conftest import SCHEDULER, SLOW, STUB, Services
from producer import Consumer, Producer
from support.queue_driver import NAMESPACE, QueueDriver, end, open_queue, tokens
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from wire.codec import encode
from wire.ids import RequestId
from wire.messages import Prompt, Request
from wire.records import ending
from wire.sampling import SamplingParams
from wire.scripts import Ending, ReclaimReason
from wire.streams import id_order

SWITCHES_PER_STEP = 10
"""A step of the stub engine is as many naps."""

LONG = SamplingParams(max_tokens=1500, min_tokens=1500, ignore_eos=True)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes share the driver's namespace, and notice the death of a group quickly."""
    tests = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tests.parent), str(tests))))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a group that is killed cannot clean up
    monkeypatch.setenv("FOREBAY_NAMESPACE", NAMESPACE)
    monkeypatch.setenv("FOREBAY_HEARTBEAT_MS", "100")
    monkeypatch.setenv("FOREBAY_GROUP_TIMEOUT_MS", "500")


@pytest.fixture
def services(redis_url: str, tmp_path: Path) -> Iterator[Services]:
    """A way to start services, which are not given the time for an orderly end."""
    services = Services(redis_url, tmp_path)
    try:
        yield services
    finally:
        services.kill_all()


@pytest.fixture
def line(redis_url: str) -> Iterator[TcpProxy]:
    """A line to the server on which things go wrong."""
    with TcpProxy(redis_url.removeprefix("unix://")) as proxy:
        yield proxy


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    """The queue's scripts, and a look at what is behind them."""
    async with open_queue(redis_url) as queue:
        yield queue


@pytest.fixture
async def producer(redis_url: str) -> AsyncIterator[Producer]:
    """A producer with a good line."""
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        yield producer


async def test_crash_after_store_leaves_no_submission_that_nobody_runs(
    pipeline: Services, producer: Producer, line: TcpProxy
) -> None:
    """A request is stored in one system and queued in another, and the caller told afterwards.

    A crash in between leaves a request that never runs; one later has the caller told that it
    failed, and it runs. Here one script stores and queues it, and to ask again under its id is to
    be told of the first submission.
    """
    stored = line.trap_reply(lambda command: b"the only one" in command)
    async with Producer(line.url, namespace=NAMESPACE) as dies:
        submitting = asyncio.create_task(dies.submit("the only one", request_id="mine"))
        await asyncio.to_thread(stored.wait)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
    again = await producer.submit("a second one", request_id="mine")
    assert (await again.result()).text == "the only one"


async def test_crash_after_store_computes_no_stored_result_again(
    services: Services, producer: Producer, queue: QueueDriver, line: TcpProxy
) -> None:
    """A worker stores a result and dies before the request is off the queue: it runs once more.

    Here the script that stores the result takes the request from the group, so there is nothing to
    give to anybody else when the group is declared dead.
    """
    services.start(*SCHEDULER)
    doomed = services.start(*STUB, redis_url=line.url, group_id="doomed")
    stored = line.trap_reply(lambda command: b"computed once" in command and b"done" in command)
    handle = await producer.submit("computed once", request_id="mine")
    await asyncio.to_thread(stored.wait)
    services.end(doomed, signal.SIGKILL)
    record = await queue.record("mine")
    assert (await handle.result()).text == "computed once"
    await until_gone(queue, "doomed")
    assert await queue.record("mine") == record
    assert (await queue.queue(), record["num_crashes"]) == ([], b"0")


async def test_cancel_event_lost_ends_the_request_all_the_same(
    services: Services, producer: Producer, queue: QueueDriver
) -> None:
    """A cancellation is noted, and the event that should stop the work is lost with its reader.

    The request then runs to its end, or is stuck in "cancelling". Here the note stands in the
    record, and whoever takes the request from the dead group ends it.
    """
    services.start(*SCHEDULER)
    group = services.start(*SLOW, group_id="doomed")
    handle = await producer.submit("on and on", sampling=LONG, stream=True)
    await anext(handle.stream())
    group.send_signal(signal.SIGSTOP)
    await handle.cancel()
    services.end(group, signal.SIGKILL)
    result = await handle.outcome()
    assert result.state == "cancelled"
    assert 0 < len(result.token_ids) < 1500
    assert await queue.queue() == []


async def test_orphaned_blob_nothing_is_left_of_requests_that_have_ended(
    services: Services, producer: Producer, queue: QueueDriver
) -> None:
    """A worker uploads its output and dies before the record names it: nobody will ever delete it.

    Here output lies only under names made of the request's id, and a dead group's mail goes with
    the group. With 20 requests, one of them cancelled, one expired, and their group killed halfway,
    no key and no value has a trace of them once their results were taken.
    """
    services.start(*SCHEDULER)
    doomed = services.start(*SLOW, group_id="doomed")
    sampling = SamplingParams(max_tokens=100, min_tokens=100, ignore_eos=True)
    requests = [
        Request(
            RequestId(f"blob-{index}"),
            Prompt(text="blob of text"),
            LONG if index < 2 else sampling,
            stream=index % 2 == 0,
            timeout_s=0.8 if index == 0 else None,
        )
        for index in range(20)
    ]

    async def kill_halfway() -> None:
        while not (await queue.record("blob-19")).get("num_journaled"):
            await asyncio.sleep(0.01)
        services.end(doomed, signal.SIGKILL)
        await queue.cancel("blob-1")
        services.start(*STUB, group_id="heir")

    killing = asyncio.create_task(kill_halfway())
    states = Counter([r.state async for r in producer.submit_many(requests, forget=True)])
    await killing
    assert states == {"done": 18, "cancelled": 1, "expired": 1}
    await until_gone(queue, "doomed")
    assert [entry async for entry in everything(queue.client) if b"blob" in entry] == []


async def test_stranded_finalization_a_run_ends_though_it_is_not_told_of_its_last_results(
    pipeline: Services, producer: Producer, queue: QueueDriver, line: TcpProxy
) -> None:
    """All rows are done, but what should have closed the batch is lost: it never becomes final.

    Here the records say what has ended, and the news in the results stream only makes that quick:
    whoever waits for news that never comes looks at the records.
    """
    requests = [
        Request(RequestId(f"row-{index}"), Prompt(text=f"row {index}")) for index in range(9)
    ]
    news = line.trap_reply(lambda command: b"XREAD" in command and b":results:" in command)
    async with Producer(line.url, namespace=NAMESPACE) as stranded:
        results = stranded.submit_many(requests)
        running = asyncio.ensure_future(anext(results))
        await asyncio.to_thread(news.wait)
        for request in requests:
            await (producer.attach(request.request_id)).outcome()
        async for key in queue.client.scan_iter(f"{queue.keys.prefix}:results:*"):
            await queue.client.delete(key)
        line.cut()
        ended = [await running] + [result async for result in results]
    assert {result.text for result in ended} == {f"row {index}" for index in range(9)}
    assert len(ended) == 9


async def test_zombie_owner_stops_burning_inference_when_it_wakes_up(
    services: Services, producer: Producer
) -> None:
    """An owner is frozen, another finishes its work, and thawed it computes all of it once more.

    Here its next commit or heartbeat tells it that this is no longer its work, and it drops it: of
    some 1400 steps that it has left it does less than 100.
    """
    services.start(*SCHEDULER)
    zombie = services.start(*SLOW, group_id="owner")
    handle = await producer.submit("on and on", sampling=LONG, stream=True)
    await anext(handle.stream())
    processes = [psutil.Process(zombie.pid), *psutil.Process(zombie.pid).children()]
    for process in processes:
        process.suspend()
    services.start(*STUB, group_id="owner")
    result = await handle.result()
    assert result.text == ("on and on" * 170)[:1500]
    _, rank = processes
    num_switches = rank.num_ctx_switches().voluntary
    for process in reversed(processes):
        process.resume()
    services.wait_for_log(zombie, "declared dead")
    assert await asyncio.to_thread(wait_until, lambda: is_idle(rank))
    assert rank.num_ctx_switches().voluntary - num_switches < 100 * SWITCHES_PER_STEP
    # And it is a good member again.
    assert (await (await producer.submit("after that")).result()).text == "after that"


async def test_result_destruction_what_was_sent_to_a_consumer_that_died_is_sent_again(
    pipeline: Services, producer: Producer, redis_url: str, line: TcpProxy
) -> None:
    """Results are popped from a list: what a reader had popped when it died is gone.

    Here what a consumer was sent stays until it is acknowledged, whether or not it ever arrived.
    """
    async with Producer(redis_url, namespace=NAMESPACE, results="shared") as sharing:
        handle = await sharing.submit("kept for the living")
        await handle.outcome()
    sent = line.trap_reply(lambda command: b"XREADGROUP" in command)
    async with contextlib.AsyncExitStack() as stack:
        dies = await stack.enter_async_context(
            Consumer(line.url, namespace=NAMESPACE, results="shared")
        )
        reading = asyncio.ensure_future(anext(aiter(dies)))
        await asyncio.to_thread(sent.wait)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    async with Consumer(
        redis_url, namespace=NAMESPACE, results="shared", take_over_after_s=0.2
    ) as lives:
        delivery = await anext(aiter(lives))
        assert delivery.result.text == "kept for the living"
        await delivery.ack()


async def test_a_result_is_handed_to_no_other_caller(
    pipeline: Services, producer: Producer, redis_url: str
) -> None:
    """Callers pop from one shared list of results, and get each other's.

    Here results are found by id, and each producer is told of its own requests' ends alone. One who
    asks for another's request takes nothing away from it.
    """

    async def run(producer: Producer, name: str) -> Counter[tuple[str, str]]:
        requests = [
            Request(RequestId(f"{name}-{index}"), Prompt(text=f"{name} asks {index}"))
            for index in range(50)
        ]
        results = producer.submit_many(requests, max_in_flight=8)
        return Counter([(result.request_id, result.text) async for result in results])

    async with Producer(redis_url, namespace=NAMESPACE) as other:
        early = await producer.submit("seen by both", request_id="early")
        assert (await other.attach(early.request_id).result()).text == "seen by both"
        got = await asyncio.gather(run(producer, "one"), run(other, "other"))
        assert (await early.result()).text == "seen by both"
    for name, results in zip(("one", "other"), got, strict=True):
        assert results == {(f"{name}-{index}", f"{name} asks {index}"): 1 for index in range(50)}


async def test_strict_lane_starvation_a_batch_request_that_has_waited_goes_before_all_others(
    services: Services, producer: Producer, queue: QueueDriver
) -> None:
    """The highest lane that is not empty is served: under an endless load of it, only that one is.

    Here a class is a head start in time, 30 s at most: a batch request that has waited for so long
    (its submission is put back in the record) is next, however many interactive ones are queued.
    """
    fresh = await producer.submit("fresh", priority="batch")
    patient = await producer.submit("patient", priority="batch")
    key = queue.keys.request(patient.request_id)
    await queue.client.hincrby(key, "submitted_ms", -31_000)
    num_ended, is_over = 0, asyncio.Event()

    async def ask_endlessly() -> None:
        nonlocal num_ended
        while not is_over.is_set():
            handle = await producer.submit("now!", priority="interactive")
            await handle.outcome()
            num_ended += 1

    load = [asyncio.create_task(ask_endlessly()) for _ in range(20)]
    while len(await queue.queue("interactive")) < len(load):
        await asyncio.sleep(0.01)
    services.start(*SCHEDULER)
    services.start(*SLOW, max_num_seqs=1)
    assert (await patient.result()).text == "patient"
    assert num_ended <= 10
    while num_ended < 25:
        await asyncio.sleep(0.01)
    assert await queue.state(fresh.request_id) == "queued"
    is_over.set()
    await asyncio.gather(*load, fresh.outcome())


async def test_a_reservation_is_not_leaked_on_retry(queue: QueueDriver) -> None:
    """Capacity is reserved when a request is sent, and given back with its result.

    A retry has no result: every one of them leaks a slot, until none is left and the queue is
    stuck. Here a slot is nothing but the request's id in the set of what the group holds. After any
    way back to the queue, sent twice where replies get lost, a group with room for one has room.
    """
    await queue.submit("a")
    ways: tuple[ReclaimReason, ...] = ("leaving", "lapsed", "crashed")
    for life, how in enumerate(2 * ways):
        epoch = await queue.join()
        fence = await assigned(queue, "a")
        assert await queue.assign("a", credits=1) == "full"
        await queue.commit(tokens("a", fence, life, 1))
        if how == "leaving":
            for _ in range(2):
                await queue.commit(end("a", fence, "retry"))
                assert await num_owned(queue) == 0
            await retried(queue)
            fence = await assigned(queue, "a")
        if how == "lapsed":
            await queue.kill(epoch=epoch)
        for _ in range(2):
            await queue.reclaim(epoch=epoch, how=how, max_crashes=100)
            assert await num_owned(queue) == 0
        # Too late, from the life before.
        assert await queue.commit(end("a", fence), epoch=epoch) == ["a"]
        assert await num_owned(queue) == 0
    await queue.join()
    fence = await assigned(queue, "a")
    for _ in range(2):
        await queue.commit(end("a", fence))
        assert await num_owned(queue) == 0
    assert await queue.state("a") == "done"


async def test_a_reservation_is_not_leaked_with_a_request_that_is_gone(queue: QueueDriver) -> None:
    """The same for a request that is deleted while a group has it.

    It is computed once more because the server has lost its result, which somebody had read before
    that and then forgets: the group's commit, which comes too late, gives the slot back.
    """
    await queue.submit("a")
    epoch = await queue.join()
    fence = await assigned(queue, "a")
    await queue.client.delete(queue.keys.request(RequestId("a")))
    assert await queue.commit(end("a", fence), epoch=epoch) == ["a"]
    assert await num_owned(queue) == 0


async def test_a_reservation_is_not_leaked_in_the_intake_either(queue: QueueDriver) -> None:
    """A request that is deleted while a scheduler has it leaves no entry, which would count."""
    await queue.submit("a")
    await queue.join()
    gone = await queue.queued("a")
    await queue.client.delete(queue.keys.request(gone.request_id))
    assert await queue.assign(gone) == []
    assert await queue.queue() == []


async def test_ack_on_the_wrong_delivery_ends_only_what_was_delivered(
    pipeline: Services, redis_url: str, line: TcpProxy
) -> None:
    """A message is delivered again while the first delivery is dealt with, both under one name.

    The end of the first then acknowledges the second, whose work is lost if it fails. Here a late
    ack ends exactly the result that its consumer has had, which is as good as dealt with; what else
    was delivered in between stays with whoever has it.
    """
    async with Producer(redis_url, namespace=NAMESPACE, results="shared") as sharing:
        await (await sharing.submit("first")).outcome()
        async with contextlib.AsyncExitStack() as stack:

            async def consumer(url: str, take_over_after_s: float) -> Consumer:
                return await stack.enter_async_context(
                    Consumer(
                        url,
                        namespace=NAMESPACE,
                        results="shared",
                        take_over_after_s=take_over_after_s,
                    )
                )

            late = await consumer(line.url, 0.3)
            had = await anext(aiter(late))
            line.hold()  # it seems to be dead now
            other = await consumer(redis_url, 0.3)
            again = await anext(aiter(other))
            await (await sharing.submit("second")).outcome()
            second = await anext(aiter(other))
            acking = asyncio.create_task(had.ack())
            line.heal()
            await acking
            assert had.result == again.result
            await again.ack()  # once more does no harm
        # `other` is gone without having dealt with the second one.
        async with contextlib.AsyncExitStack() as stack:
            heir = await consumer(redis_url, 0.1)
            delivery = await anext(aiter(heir))
            assert delivery.result == second.result
            await delivery.ack()


async def test_ack_on_the_wrong_delivery_does_not_take_a_request_out_of_the_intake(
    queue: QueueDriver,
) -> None:
    """The same for what a scheduler has read: one that slept acts on a delivery of long ago.

    Since then the request has been with another group and has come back, under another entry.
    """
    await queue.submit("a")
    slept = await queue.queued("a")
    epoch = await queue.join()
    await assigned(queue, "a")
    await queue.kill(epoch=epoch)
    await queue.reclaim(epoch=epoch)
    await queue.join("h")
    assert await queue.assign(slept, group="h") == []
    assert await queue.queue() == ["a"]
    await assigned(queue, "a", group="h")
    assert await queue.queue() == []


async def test_ack_on_the_wrong_delivery_does_not_end_a_later_submission_of_the_same_name(
    queue: QueueDriver,
) -> None:
    """Names of requests, or of queues for results, are used again, and a late act hits the new one.

    The server has lost a submission, which was then made again. What a scheduler still knows of the
    first one (its deadline, for example) says nothing of the second, which keeps its own entry.
    """
    await queue.submit("a", timeout_ms=1)
    lost = await queue.queued("a")
    await queue.client.delete(queue.keys.request(lost.request_id), queue.keys.intakes["standard"])
    while (await queue.scripts.fleet())[0] <= id_order(lost.entry_id)[0]:
        pass  # no server is lost and back within a millisecond
    await queue.submit("a")
    await queue.join()
    assert await queue.assign(lost) == []
    assert await queue.scripts.reject([Ending(lost, "expired", encode(ending("expired")))]) == 0
    assert (await queue.state("a"), await queue.queue()) == ("queued", ["a"])
    await assigned(queue, "a")
    assert await queue.queue() == []


async def assigned(queue: QueueDriver, request_id: str, group: str = "g") -> int:
    """Assign to a group with room for one; the fence."""
    assert await queue.assign(request_id, group=group, credits=1) == [request_id]
    return await queue.fence(request_id)


async def retried(queue: QueueDriver) -> None:
    """Wait until a request that has waited is queued again."""
    while not (await queue.retry(max_errors=100, delay_ms=1, max_delay_ms=1))[0]:
        await asyncio.sleep(0.001)


async def num_owned(queue: QueueDriver) -> int:
    """How many requests all groups hold, as far as their credits are concerned."""
    pattern = f"{queue.keys.prefix}:group:*:owned"
    return sum([await queue.client.scard(key) async for key in queue.client.scan_iter(pattern)])


async def until_gone(queue: QueueDriver, group: str) -> None:
    """Wait until the fleet has declared a group dead, and taken everything from it."""
    async with asyncio.timeout(10):
        while any(entry.group_id == group for entry in (await queue.scripts.fleet())[1]):
            await asyncio.sleep(0.01)


async def everything(client: Redis) -> AsyncIterator[bytes]:
    """Every key of the server with what it holds."""
    readers: dict[bytes, Callable[[bytes], Awaitable[object]]] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1),
        b"stream": client.xrange,
    }
    async for key in client.scan_iter():
        kind = cast("bytes", await client.type(key))
        yield repr((key, await readers[kind](key))).encode()


def is_idle(rank: psutil.Process) -> bool:
    """Whether a rank with the slow engine has nothing to compute."""
    before = rank.num_ctx_switches().voluntary
    time.sleep(0.1)
    return rank.num_ctx_switches().voluntary - before < SWITCHES_PER_STEP
