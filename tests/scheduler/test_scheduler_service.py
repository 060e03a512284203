"""The scheduler as a whole, on a real server; the groups are played by the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker.engine.stub import stub_model_card
from scheduler.catalog import ModelCatalog
from scheduler.fleet import Fleet
from scheduler.intake import Intake
from scheduler.salts import TenantSalts
from scheduler.service import SchedulerService, open_scheduler
from service.settings import SchedulerSettings
from support.queue_driver import LONG_MS, NAMESPACE, QueueDriver, end, open_queue, tokens
from wire.client import connect
from wire.codec import decode, encode
from wire.ids import GroupId
from wire.keys import DISPATCHERS
from wire.messages import Assignment, ErrorInfo
from wire.streams import consumers, entries


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


@contextlib.asynccontextmanager
async def running(service: SchedulerService) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


@contextlib.asynccontextmanager
async def scheduling(redis_url: str, **options: Any) -> AsyncIterator[None]:
    settings = SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE, **options)
    async with open_scheduler(settings) as service, running(service):
        yield


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def all_in(queue: QueueDriver, state: str, *ids: str) -> None:
    async def there() -> bool:
        return all([await queue.state(request_id) == state for request_id in ids])

    await eventually(there)


async def join(
    queue: QueueDriver, group: str = "g", model: str = "m", *, timeout_ms: int = LONG_MS
) -> int:
    card = stub_model_card(name=model)
    return await queue.join(group, model=model, card=card, timeout_ms=timeout_ms)


async def assignments(queue: QueueDriver, group: str = "g") -> list[Assignment]:
    epoch = await queue.epoch(group)
    inbox = await entries(queue.client, queue.keys.inbox(GroupId(group), epoch))
    return [
        decode(Assignment, value)
        for _, fields in inbox
        for name, value in fields.items()
        if name.startswith(b"assignment:")
    ]


async def error_of(queue: QueueDriver, request_id: str) -> ErrorInfo:
    await all_in(queue, "failed", request_id)
    result = await queue.result(request_id)
    assert result is not None
    assert result.error is not None
    return result.error


async def test_what_was_queued_before_any_group_goes_to_the_first(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.submit("a")
    await queue.submit("b", model="m", timeout_ms=60_000)
    async with scheduling(redis_url):
        await join(queue)
        await all_in(queue, "assigned", "a", "b")
    sent = {item.request_id: item for item in await assignments(queue)}
    fences = {request_id: await queue.fence(request_id) for request_id in sent}
    assert {item.request_id: item.fence for item in sent.values()} == fences
    assert {len(item.prompt_token_ids) for item in sent.values()} == {2}
    deadlines = [item.deadline_ms for item in sent.values()]
    assert None in deadlines
    assert int((await queue.record("b"))["deadline_ms"]) in deadlines
    assert await queue.queue() == []


async def test_tenants_get_salts_of_their_own(queue: QueueDriver, redis_url: str) -> None:
    salts = set()
    await join(queue)
    async with scheduling(redis_url):
        await queue.submit("a", "b")
        await all_in(queue, "assigned", "a", "b")
        salts = {item.cache_salt for item in await assignments(queue)}
    assert len(salts) == 1
    assert len(salts.pop()) == 16


async def test_each_model_has_its_groups(queue: QueueDriver, redis_url: str) -> None:
    await join(queue, "g", "m")
    await join(queue, "h", "n")
    async with scheduling(redis_url):
        await queue.submit("a", model="m")
        await queue.submit("b", model="n")
        await all_in(queue, "assigned", "a", "b")
        await queue.submit("c")
        error = await error_of(queue, "c")
        assert error == ErrorInfo(
            "invalid_request",
            "no model was named and several are served; take one of: m, n",
            "model",
        )
        await queue.submit("d", model="nope")
        assert (await error_of(queue, "d")).message.endswith("take one of: m, n")
    assert [item.request_id for item in await assignments(queue, "g")] == ["a"]
    assert [item.request_id for item in await assignments(queue, "h")] == ["b"]


async def test_a_model_that_has_left_does_not_count_as_served(
    queue: QueueDriver, redis_url: str
) -> None:
    await join(queue, "g", "m")
    async with scheduling(redis_url):
        await queue.submit("a")
        await all_in(queue, "assigned", "a")
        await queue.reclaim("g", how="crashed")
        await join(queue, "h", "n")
        # Once such a one is sent, the scheduler has seen that the one came and the other went.
        await eventually(partial(one_for_n_is_sent, queue, count()))
        await queue.submit("b")
        await all_in(queue, "assigned", "b")
    assert "b" in [item.request_id for item in await assignments(queue, "h")]


async def one_for_n_is_sent(queue: QueueDriver, numbers: Iterator[int]) -> bool:
    request_id = f"named-{next(numbers)}"
    await queue.submit(request_id, model="n")
    await eventually(partial(not_in, queue, "queued", request_id))
    return await queue.state(request_id) == "assigned"


async def not_in(queue: QueueDriver, state: str, request_id: str) -> bool:
    return await queue.state(request_id) != state


async def gone(queue: QueueDriver, group: str) -> bool:
    return group not in {entry.group_id for entry in (await queue.scripts.fleet())[1]}


@pytest.mark.parametrize(
    ("message", "code"), [(b"\xc1", "wire_error"), (b"\x92\x07\x00", "wire_error")]
)
async def test_what_cannot_be_decoded_fails_with_the_reason(
    queue: QueueDriver, redis_url: str, message: bytes, code: str
) -> None:
    async with scheduling(redis_url):
        await queue.submit("a", message=message)
        assert (await error_of(queue, "a")).code == code
    assert await queue.queue() == []
    assert (await queue.dead_letter("a"))["request"] == message


async def test_a_deadline_ends_what_nobody_can_take(queue: QueueDriver, redis_url: str) -> None:
    await join(queue)
    async with scheduling(redis_url):
        await queue.submit(*"abcdefgh")
        await all_in(queue, "assigned", *"abcdefgh")
        await queue.submit("full", timeout_ms=1)
        await queue.submit("unserved", timeout_ms=1)
        await all_in(queue, "expired", "full", "unserved")
    result = await queue.result("full")
    assert result is not None
    assert result.error is not None
    assert result.error.code == "expired"
    assert await queue.queue() == []


async def test_a_deadline_ends_what_waits_for_a_model(queue: QueueDriver, redis_url: str) -> None:
    async with scheduling(redis_url):
        await queue.submit("a", timeout_ms=1)
        await all_in(queue, "expired", "a")


async def test_no_more_is_read_than_the_window_holds(queue: QueueDriver, redis_url: str) -> None:
    key = queue.keys.intakes["standard"]

    async def num_read() -> int:
        return sum((await consumers(queue.client, key, DISPATCHERS)).values())

    async with scheduling(redis_url, window=2):
        await queue.submit(*"abcdef")
        await queue.submit("urgent", priority="interactive")
        await eventually(lambda: is_pending(queue, "interactive"))
        assert await num_read() <= 2, "and a flood of one class keeps no other out"
        await join(queue)
        await all_in(queue, "assigned", *"abcdef", "urgent")


async def is_pending(queue: QueueDriver, priority: str) -> bool:
    key = queue.keys.intakes[priority]  # type: ignore[index]
    return sum((await consumers(queue.client, key, DISPATCHERS)).values()) > 0


async def test_a_dead_groups_work_goes_on_elsewhere_until_it_has_killed_too_many(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.submit("a", stream=True)
    async with scheduling(redis_url, max_crashes=2, group_timeout_ms=1500):
        await join(queue, "g", timeout_ms=1500)
        await all_in(queue, "assigned", "a")
        first_fence = await queue.fence("a")
        await queue.commit(tokens("a", first_fence, 0, 5, 6))
        await eventually(lambda: gone(queue, "g"))
        epoch = await join(queue, "h", timeout_ms=1500)
        await eventually(lambda: owned_by(queue, "a", f"h:{epoch}".encode()))
        [again] = await assignments(queue, "h")
        assert again.fence > first_fence + 1
        assert (list(again.generated), again.generated_text) == ([5, 6], "xx")
        error = await error_of(queue, "a")
    assert error.code == "worker_lost"
    assert "died 2 times" in error.message


async def test_every_attempt_draws_with_the_same_seed(queue: QueueDriver, redis_url: str) -> None:
    """Also where nobody asked for one: what follows must fit what is already out."""
    await queue.submit("a", "b")
    seeds = set()
    async with scheduling(redis_url):
        for group in "gh":
            await join(queue, group)
            await all_in(queue, "assigned", "a", "b")
            seeds |= {(item.request_id, item.sampling.seed) for item in await assignments(queue)}
            await queue.reclaim(group, how="leaving")
    assert len(seeds) == 2
    assert len({seed for _, seed in seeds}) == 2


async def test_a_poisonous_request_is_found_by_bisecting(
    queue: QueueDriver, redis_url: str
) -> None:
    """One of eight kills whatever group it is on; it dies alone, and all others are answered."""
    ids = list("abcdefgh")
    await queue.submit(*ids)
    ended: list[str] = []
    sizes: list[int] = []
    async with scheduling(redis_url):
        await join(queue)
        while len(ended) < 8:
            await eventually(lambda: holds_something(queue))
            held = await held_by(queue, ids)
            sizes.append(len(held))
            if "f" in held:
                failed = await queue.reclaim(how="crashed")
                ended += ["f"] * (failed or (0, 0))[1]
                await join(queue)
            else:
                fences = {request_id: await queue.fence(request_id) for request_id in held}
                await queue.commit(*(end(request_id, fences[request_id]) for request_id in held))
                ended += held
    assert sorted(await queue.ended()) == [(i, "failed" if i == "f" else "done") for i in ids]
    assert (await queue.dead_letter("f"))["reason"] == b"worker_lost"
    assert sizes[:2] == [8, 8]
    assert max(sizes[2:]) <= 4, "halved from the second crash on"
    # With all, twice; then in a half, in a quarter and alone, unless its neighbours went before it.
    assert int((await queue.dead_letter("f"))["num_crashes"]) in (4, 5)


async def holds_something(queue: QueueDriver) -> bool:
    return any(entry.num_owned for entry in (await queue.scripts.fleet())[1])


async def held_by(queue: QueueDriver, ids: list[str]) -> list[str]:
    return [request_id for request_id in ids if await queue.state(request_id) == "assigned"]


async def test_after_an_error_the_scheduler_sends_a_request_again(
    queue: QueueDriver, redis_url: str
) -> None:
    await queue.submit("a")
    async with scheduling(redis_url, max_errors=2, retry_delay_ms=1):
        await join(queue)
        for _ in range(2):
            await all_in(queue, "assigned", "a")
            await queue.commit(end("a", await queue.fence("a"), "retry"))
        await all_in(queue, "failed", "a")
    assert (await queue.dead_letter("a"))["reason"] == b"retries_exhausted"


async def owned_by(queue: QueueDriver, request_id: str, owner: bytes) -> bool:
    return (await queue.record(request_id)).get("owner") == owner


async def test_what_a_stopped_scheduler_held_goes_to_the_next(
    queue: QueueDriver, redis_url: str
) -> None:
    async with scheduling(redis_url):
        await queue.submit("a")
        await eventually(lambda: is_pending(queue, "standard"))
    async with scheduling(redis_url):
        await join(queue)
        await all_in(queue, "assigned", "a")


async def test_two_schedulers_send_everything_once(queue: QueueDriver, redis_url: str) -> None:
    ids = [f"r{i}" for i in range(60)]
    async with scheduling(redis_url), scheduling(redis_url):
        for group in range(8):
            await join(queue, f"g{group}")
        await queue.submit(*ids)
        await all_in(queue, "assigned", *ids)
        sent = [
            item.request_id for group in range(8) for item in await assignments(queue, f"g{group}")
        ]
    assert sorted(sent) == sorted(ids)


# The catalog


async def test_a_card_is_read_again_when_its_model_changes(queue: QueueDriver) -> None:
    catalog = ModelCatalog(queue.client, queue.keys)
    assert catalog.get("m") is None
    await catalog.refresh("m")
    assert catalog.get("m") is None
    await join(queue)
    await catalog.refresh("m")
    first = catalog.get("m")
    await catalog.refresh("m")
    assert catalog.get("m") is first, "the same card is not parsed twice"
    await queue.join(card=replace(stub_model_card(name="m"), max_model_len=7))
    await catalog.refresh("m")
    now = catalog.get("m")
    assert now is not None
    assert now.card.max_model_len == 7


@pytest.mark.parametrize("broken", ["bytes", "tokenizer", "template"])
async def test_a_broken_card_is_refused_and_the_last_good_one_stays(
    queue: QueueDriver, broken: str
) -> None:
    catalog = ModelCatalog(queue.client, queue.keys)
    await join(queue)
    await catalog.refresh("m")
    good, card = catalog.get("m"), stub_model_card(name="m")
    data = {
        "bytes": b"\xc1",
        "tokenizer": encode(replace(card, tokenizer_json=b"?")),
        "template": encode(replace(card, chat_template="{% if %}")),
    }[broken]
    await queue.scripts.register(GroupId("g"), model="m", card=data)
    await catalog.refresh("m")
    assert good is not None
    assert catalog.get("m") is good


async def test_a_card_whose_reply_is_lost_is_asked_for_again(
    queue: QueueDriver, redis_url: str
) -> None:
    """A group joins only once; while its card is unknown its requests wait, and none is refused."""
    catalog = FlakyCatalog(queue)
    blocking = connect(redis_url, blocking=True)
    service = SchedulerService(
        SchedulerSettings(redis_url=redis_url, namespace=NAMESPACE),
        queue.scripts,
        intake=Intake(queue.client, blocking, queue.keys),
        fleet=Fleet(queue.scripts, max_crashes=3, grace_s=1.0),
        catalog=catalog,
        salts=TenantSalts(bytes(32)),
    )
    await queue.submit("a", model="m")
    async with running(service):
        await join(queue)
        await all_in(queue, "assigned", "a")
    await blocking.aclose()
    assert catalog.num_failures == 3


class FlakyCatalog(ModelCatalog):
    def __init__(self, queue: QueueDriver) -> None:
        super().__init__(queue.client, queue.keys)
        self.num_failures = 0
        self._queue = queue

    async def refresh(self, model: str) -> None:
        if self.num_failures < 3:
            self.num_failures += 1
            await self._queue.submit(f"meanwhile-{self.num_failures}", model="m")
            raise RedisConnectionError("the reply was lost")
        await super().refresh(model)
