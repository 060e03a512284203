"""Tenants and the prefix cache, from producer to engine: what is shared, and what never is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from forebay.broker_binary import find_broker
from gpu_worker import service
from producer import Producer
from scheduler.service import open_scheduler
from service.settings import SchedulerSettings, WorkerSettings
from support.fake_ranks import ranks_that
from support.queue_driver import NAMESPACE, QueueDriver, open_queue
from wire.ids import RequestId
from wire.messages import Prompt, Request, Result
from wire.sampling import SamplingParams

# What is tested is not the server: one kind of it will do.
pytestmark = pytest.mark.parametrize("broker_binary", [find_broker()], indirect=True)

TESTS = Path(__file__).parents[1]
TENANTS = "abc"
BLOCK_SIZE = 16
PROMPT = "What all of a tenant's requests begin with. " * 40
NUM_FULL_BLOCKS = len(PROMPT) // BLOCK_SIZE

ENGINE = f"""
    sys.path.insert(0, {str(TESTS)!r})
    from dataclasses import replace
    from gpu_worker.engine.engine import Engine, EngineModel
    from gpu_worker.rank import serve as serve_engine
    from support.engine_fakes import HashingRunner, rank_options

    options = rank_options(block_size={BLOCK_SIZE}, max_num_batched_tokens=512)
    options = replace(options, model_name='stub')
    runner = HashingRunner(num_blocks=1024, block_size={BLOCK_SIZE}, vocab_size=257)
    engine = Engine(runner, EngineModel(257, 2048, (), 1024, "fake"), options)
    channel.send(replace(ready, max_model_len=2048, cache_format=engine.cache_format))
    serve_engine(channel, engine)
"""
"""A rank with the real engine, and a model that is a hash function."""


@contextlib.asynccontextmanager
async def group(redis_url: str, name: str) -> AsyncIterator[None]:
    settings = WorkerSettings.load(
        model="stub:",
        redis_url=redis_url,
        namespace=NAMESPACE,
        group_id=name,
        block_size=BLOCK_SIZE,
    )
    running = asyncio.create_task(service.run(settings), name=name)
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def scheduling(redis_url: str) -> AsyncIterator[None]:
    settings = SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE)
    async with open_scheduler(settings) as scheduler:
        stop = asyncio.Event()
        running = asyncio.create_task(scheduler.run(stop), name="scheduler")
        try:
            yield
        finally:
            stop.set()
            await running


async def eventually_known(queue: QueueDriver, num_blocks: int) -> None:
    """Wait until the directory has so many blocks."""
    async with asyncio.timeout(20):
        while True:
            keys = cast("list[bytes]", await queue.client.keys("*:cache:device"))
            if sum([await queue.client.scard(key.decode()) for key in keys]) >= num_blocks:
                return
            await asyncio.sleep(0.01)


async def test_a_tenant_s_prefix_is_found_by_that_tenant_alone(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_that(monkeypatch, ENGINE)

    async def ask(producer: Producer, name: str, tenant: str) -> Result:
        request = Request(
            RequestId(name),
            Prompt(text=f"{PROMPT}{name}"),
            SamplingParams(max_tokens=2, temperature=0.0),
            tenant=tenant,
        )
        [result] = [one async for one in producer.submit_many([request])]
        assert result.state == "done", result.error
        return result

    async with contextlib.AsyncExitStack() as stack:
        queue = await stack.enter_async_context(open_queue(redis_url))
        producer = await stack.enter_async_context(Producer(redis_url, namespace=NAMESPACE))
        await stack.enter_async_context(group(redis_url, "g"))
        async with scheduling(redis_url):
            for tenant in TENANTS:
                first = await ask(producer, f"first-of-{tenant}", tenant)
                assert first.num_cached_tokens == 0, "others have asked the same"
            await eventually_known(queue, len(TENANTS) * NUM_FULL_BLOCKS)
        # Another scheduler, which does not know what was sent where, and an idle group.
        await stack.enter_async_context(group(redis_url, "h"))
        async with asyncio.timeout(60):
            while len((await queue.scripts.fleet())[1]) < 2:
                await asyncio.sleep(0.02)
        await stack.enter_async_context(scheduling(redis_url))
        for tenant in TENANTS:
            again = await ask(producer, f"{tenant}-again", tenant)
            assert again.num_cached_tokens == NUM_FULL_BLOCKS * BLOCK_SIZE, "it went where it is"
        newcomer = await ask(producer, "newcomer", "d")
        assert newcomer.num_cached_tokens == 0
