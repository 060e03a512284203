"""Cancelling a request in the moment in which it ends: one result or the other, never both."""

from __future__ import annotations

import asyncio

from producer.handle import RequestHandle
from producer.producer import Producer
from support.known_output import KnownOutput, assert_adds_up
from support.queue_driver import NAMESPACE, QueueDriver
from wire.errors import RequestCancelled
from wire.messages import Chunk
from wire.streams import entries

OUTPUT = KnownOutput(9)


async def read(handle: RequestHandle) -> list[Chunk]:
    chunks: list[Chunk] = []
    try:
        async for chunk in handle:
            chunks.append(chunk)
    except RequestCancelled:
        pass
    return chunks


async def test_whichever_comes_first_is_the_one_result_for_everybody(
    queue: QueueDriver, redis_url: str
) -> None:
    """Cancelled in the moment in which it is assigned, goes on, or ends."""
    names = [f"{number}" for number in range(36)]
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handles = {name: await producer.submit("x", request_id=name, stream=True) for name in names}
        readers = {name: asyncio.create_task(read(handles[name])) for name in names}
        epoch = await queue.join()

        async def run(name: str, when: int, *, cancel_first: bool) -> None:
            queued = await queue.queued(name)
            fence = queued.fence + 1
            steps = [
                queue.assign(queued, epoch=epoch, credits=100),
                queue.commit(OUTPUT.progress(name, fence, 0, 4), epoch=epoch),
                queue.commit(
                    OUTPUT.progress(name, fence, 4, 9), OUTPUT.end(name, fence), epoch=epoch
                ),
            ]
            for number, step in enumerate(steps):
                both = [step, handles[name].cancel()] if number == when else [step]
                await asyncio.gather(*(both[::-1] if cancel_first else both))

        await asyncio.gather(
            *(
                run(name, number % 3, cancel_first=number % 2 == 0)
                for number, name in enumerate(names)
            )
        )
        outcomes = {name: await handles[name].outcome() for name in names}
        assert {outcome.state for outcome in outcomes.values()} == {"done", "cancelled"}
        for name, outcome in outcomes.items():
            assert await producer.attach(name).outcome() == outcome
            assert outcome.state == await queue.state(name)
            assert_adds_up(await readers[name], outcome)
            [*_, (_, last)] = await entries(
                queue.client, queue.keys.journal(handles[name].request_id)
            )
            assert last == {b"state": outcome.state.encode()}
            await handles[name].cancel()
            assert await handles[name].outcome() == outcome, "too late, and harmless"


async def test_a_request_that_is_told_to_stop_ends_as_its_group_says(
    queue: QueueDriver, redis_url: str
) -> None:
    """The wish is on its way when the group commits: done is done, stopped is stopped."""
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        handles = [await producer.submit("x", request_id=name) for name in ("done", "cancelled")]
        await queue.join()
        await queue.assign("done", "cancelled")
        for handle in handles:
            await handle.cancel()
            assert await queue.state(handle.request_id) == "assigned"
        await queue.commit(
            OUTPUT.end("done", await queue.fence("done"), "done"),
            OUTPUT.end("cancelled", await queue.fence("cancelled"), "cancelled"),
        )
        assert [(await handle.outcome()).state for handle in handles] == ["done", "cancelled"]
        assert await queue.commit(OUTPUT.end("done", 1, "cancelled")) == ["done"]
        assert (await producer.attach("done").outcome()).state == "done"
