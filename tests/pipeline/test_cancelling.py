"""Cancelling at any moment in a running pipeline: one result or the other, never both."""

from __future__ import annotations

import asyncio
import random

from redis.asyncio import Redis

from pipeline.conftest import SCHEDULER, STUB, Services
from producer import Producer, RequestHandle
from wire.errors import RequestCancelled
from wire.sampling import SamplingParams

NUM_REQUESTS = 40


async def test_cancel_and_completion_give_one_of_the_two_results(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    services.start(*STUB)
    chance = random.Random(1)
    async with Producer(redis_url) as producer, Redis.from_url(redis_url) as client:
        warm_up = await producer.submit("the services are up")
        await warm_up.result()
        handles = [
            await producer.submit(
                "on and on",
                stream=index % 2 == 0,
                sampling=SamplingParams(max_tokens=400, min_tokens=400, ignore_eos=True),
            )
            for index in range(NUM_REQUESTS)
        ]
        read = [asyncio.create_task(_read(handle)) for handle in handles]
        stopping = [
            asyncio.create_task(_cancel_after(handle, chance.uniform(0, 0.4))) for handle in handles
        ]
        for handle, reading, cancelling in zip(handles, read, stopping, strict=True):
            await cancelling
            outcome, tokens = await handle.outcome(), await reading
            assert outcome.state in {"done", "cancelled"}
            assert await producer.attach(handle.request_id).outcome() == outcome
            assert tokens == list(outcome.token_ids), "what was read is what the result has"
            assert (outcome.state == "done") == (len(tokens) == 400)
            state = await client.hget(f"{{forebay:0}}:request:{handle.request_id}", "state")
            assert state == outcome.state.encode()


async def _cancel_after(handle: RequestHandle, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    await handle.cancel()


async def _read(handle: RequestHandle) -> list[int]:
    tokens: list[int] = []
    try:
        async for chunk in handle:
            assert chunk.offset == len(tokens)
            tokens += chunk.token_ids
    except RequestCancelled:
        pass
    return tokens
