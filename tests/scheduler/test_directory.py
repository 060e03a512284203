"""The scheduler's side of the directory, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

import scheduler.directory
from cache.prefix_hash import PrefixHasher
from gpu_worker.engine.stub import stub_model_card
from scheduler.directory import Directory
from scheduler.salts import TenantSalts
from scheduler.service import open_scheduler
from service.settings import SchedulerSettings
from support.queue_driver import NAMESPACE, QueueDriver, open_queue
from support.ready_requests import fleet, group, ready
from wire.codec import decode, encode
from wire.ids import GroupId, RequestId, TokenIds, token_ids
from wire.messages import Assignment, PrefixSource, Prompt, Request
from wire.scripts import CachedPrefix, DirectoryUpdate
from wire.streams import entries

TWO = fleet(group("g"), group("h"))
CARD = stub_model_card(name="m")
PROMPT = token_ids([1 + i % 250 for i in range(20 * CARD.block_size)])


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


async def hold(queue: QueueDriver, name: str, hashes: Sequence[bytes]) -> str:
    """Have a group report blocks; returns its key."""
    epoch = await queue.epoch(name)
    update = DirectoryUpdate(1, device=b"".join(hashes))
    assert await queue.scripts.directory_update(GroupId(name), epoch, update) == 1
    return f"{name}:{epoch}"


# Asking


async def test_each_request_gets_what_each_group_has_of_it(queue: QueueDriver) -> None:
    await queue.join("g")
    await queue.join("h")
    one, same, other, short = ready(range(40)), ready(range(40)), ready(range(7, 90)), ready([1])
    g = await hold(queue, "g", one.chain("f")[:4])
    h = await hold(queue, "h", [*one.chain("f"), *other.chain("f")[:2]])
    cached = await Directory(queue.scripts).ask([one, same, other, short], TWO)
    assert cached[one.request_id] == {g: CachedPrefix(4, 4), h: CachedPrefix(10, 10)}
    assert cached[same.request_id] == cached[one.request_id]
    assert cached[other.request_id] == {h: CachedPrefix(2, 2)}
    assert short.request_id not in cached


async def test_groups_of_other_cache_formats_are_asked_by_their_own_hashes(
    queue: QueueDriver,
) -> None:
    await queue.join("g")
    await queue.join("h")
    request = ready(range(40))
    others = tuple(bytes([i]) * 16 for i in range(10))
    request = replace(request, chains={**request.chains, "other": cast("Any", others)})
    g = await hold(queue, "g", request.chain("f")[:4])
    h = await hold(queue, "h", others)
    cached = await Directory(queue.scripts).ask([request], TWO)
    assert cached == {request.request_id: {g: CachedPrefix(4, 4), h: CachedPrefix(10, 10)}}


async def test_one_call_is_made_for_a_plan_and_several_only_for_very_many(
    queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    query = queue.scripts.directory_query

    async def counted(chains: Sequence[bytes]) -> Any:
        sizes.append(len(chains))
        return await query(chains)

    monkeypatch.setattr(queue.scripts, "directory_query", counted)
    directory = Directory(queue.scripts)
    requests = [ready([i, *range(40)]) for i in range(64)]
    await directory.ask([*requests, *requests], TWO)
    assert sizes == [64]
    monkeypatch.setattr(scheduler.directory, "MAX_LOOKS", 100)
    await directory.ask(requests, TWO)
    assert len(sizes) > 2
    assert sum(sizes[1:]) == 64
    await directory.ask([ready([1])], TWO)
    assert sum(sizes[1:]) == 64, "a prompt without a full block is cached nowhere"


async def test_what_the_server_does_not_answer_in_time_is_done_without(
    queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.directory, "MAX_LOOKS", 1)
    await queue.join("g")
    requests = [ready(range(40)), ready(range(7, 90))]
    await hold(queue, "g", [*requests[0].chain("f"), *requests[1].chain("f")])
    query = queue.scripts.directory_query
    num_calls = 0

    async def slow(chains: Sequence[bytes]) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            await asyncio.sleep(60)
        return await query(chains)

    monkeypatch.setattr(queue.scripts, "directory_query", slow)
    cached = await Directory(queue.scripts, timeout_s=0.2).ask(requests, TWO)
    assert list(cached) == [requests[0].request_id]


async def test_a_server_that_is_away_does_not_keep_requests_from_being_planned(
    queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(chains: Sequence[bytes]) -> Any:
        raise RedisConnectionError("away")

    monkeypatch.setattr(queue.scripts, "directory_query", away)
    assert await Directory(queue.scripts).ask([ready(range(40))], TWO) == {}


# As a part of the scheduler


async def submit(queue: QueueDriver, name: str, prompt: TokenIds, tenant: str = "default") -> None:
    request = Request(RequestId(name), Prompt(token_ids=prompt), tenant=tenant)
    await queue.submit(name, message=encode(request))


async def assignments(queue: QueueDriver, *groups: str) -> dict[str, tuple[str, Assignment]]:
    """What was sent where."""
    found: dict[str, tuple[str, Assignment]] = {}
    for name in groups:
        inbox = queue.keys.inbox(GroupId(name), await queue.epoch(name))
        for _, fields in await entries(queue.client, inbox):
            for field, value in fields.items():
                if field.startswith(b"assignment:"):
                    assignment = decode(Assignment, value)
                    found[assignment.request_id] = name, assignment
    return found


async def sent(queue: QueueDriver, *requests: str) -> dict[str, tuple[str, Assignment]]:
    async with asyncio.timeout(10):
        while not set(requests) <= (found := await assignments(queue, "g", "h")).keys():
            await asyncio.sleep(0.01)
    return found


async def chain(queue: QueueDriver, tenant: str, cache_format: str) -> list[bytes]:
    """The hashes of the prompt's blocks as a group of that format computes them."""
    salt = (await TenantSalts.shared(queue.client, queue.keys)).of(tenant)
    hasher = PrefixHasher(
        model="m", cache_format=cache_format, salt=salt, block_size=CARD.block_size
    )
    return list(hasher.hash_blocks(PROMPT))


async def test_routing_follows_what_groups_of_different_formats_report_of_a_tenant(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.join("g", card=CARD, cache_format="one", transfer_address="tcp://g")
    await queue.join("h", card=CARD, cache_format="another")
    await hold(queue, "g", (await chain(queue, "a", "one"))[:10])
    await hold(queue, "h", (await chain(queue, "b", "another"))[:10])
    settings = SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE)
    async with open_scheduler(settings) as service:
        stop = asyncio.Event()
        running = asyncio.create_task(service.run(stop))
        await submit(queue, "of-a", PROMPT, "a")
        await sent(queue, "of-a")
        await submit(queue, "of-b", PROMPT, "b")
        found = await sent(queue, "of-b")
        stop.set()
        await running
    assert found["of-a"][0] == "g"
    assert found["of-b"][0] == "h"
    assert found["of-b"][1].prefix_source is None, "a's blocks are nothing to b"


async def test_an_assignment_tells_where_more_of_its_prompt_is_cached(
    queue: QueueDriver, redis_url: str
) -> None:
    epoch = await queue.join(
        "g", card=CARD, cache_format="f", state="draining", transfer_address="tcp://g"
    )
    await queue.join("h", card=CARD, cache_format="f")
    await hold(queue, "g", (await chain(queue, "a", "f"))[:10])
    settings = SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE)
    async with open_scheduler(settings) as service:
        stop = asyncio.Event()
        running = asyncio.create_task(service.run(stop))
        await submit(queue, "of-a", PROMPT, "a")
        await submit(queue, "of-b", PROMPT, "b")
        found = await sent(queue, "of-a", "of-b")
        stop.set()
        await running
    assert {name for name, _ in found.values()} == {"h"}
    assert found["of-a"][1].prefix_source == PrefixSource(GroupId("g"), epoch, 10, "tcp://g")
    assert found["of-b"][1].prefix_source is None
