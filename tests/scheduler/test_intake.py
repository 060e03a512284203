"""Every queued request reaches a scheduler, whichever of them dies and whichever reply is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from scheduler.intake import Arrival, Intake
from support.queue_driver import LONG_MS, QueueDriver, open_queue, tokens
from wire.client import connect
from wire.errors import InvalidRequest, WireError
from wire.ids import RequestId
from wire.keys import DISPATCHERS
from wire.messages import PRIORITIES, Priority, Request

ROOM: dict[Priority, int] = dict.fromkeys(PRIORITIES, 100)


class Lossy:
    """A client that carries out one command and loses its reply."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self.lose: str | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name != self.lose:
            return method

        async def lossy(*args: Any, **options: Any) -> None:
            self.lose = None
            await method(*args, **options)
            raise RedisConnectionError("the reply was lost")

        return lossy


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


@pytest.fixture
async def blocking(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url, blocking=True)
    yield client
    await client.aclose()


@pytest.fixture
def intake(queue: QueueDriver, blocking: Redis) -> Intake:
    return Intake(queue.client, blocking, queue.keys)


def ids(arrivals: list[Arrival]) -> list[str]:
    return [arrival.queued.request_id for arrival in arrivals]


async def taken_over(intake: Intake) -> list[Arrival]:
    return [arrival async for arrivals in intake.take_over(ROOM) for arrival in arrivals]


async def test_all_classes_are_read_each_within_its_room(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    for priority in PRIORITIES:
        await queue.submit(*(f"{priority}-{i}" for i in range(3)), priority=priority)
    first = await intake.read({"interactive": 2, "standard": 3, "batch": 0})
    assert ids(first) == ["interactive-0", "interactive-1", "standard-0", "standard-1"]
    second = await intake.read(ROOM)
    assert sorted(ids(second)) == ["batch-0", "batch-1", "batch-2", "interactive-2", "standard-2"]


async def test_an_arrival_says_all_that_is_needed_to_send_it_on(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    await queue.submit("a", timeout_ms=LONG_MS)
    [arrival] = await intake.read(ROOM)
    assert isinstance(arrival.request, Request)
    assert arrival.queued == await queue.queued("a")
    assert arrival.deadline_ms == int((await queue.record("a"))["deadline_ms"])
    assert len(arrival.journaled.token_ids) == 0


async def test_two_schedulers_share_the_queue(
    queue: QueueDriver, intake: Intake, blocking: Redis
) -> None:
    other = Intake(queue.client, blocking, queue.keys)
    await intake.open()
    await other.open()
    await queue.submit(*"abcd")
    one = ids(await intake.read({"interactive": 0, "standard": 2, "batch": 0}))
    two = ids(await other.read(ROOM))
    assert (one, two) == (["a", "b"], ["c", "d"])
    assert await taken_over(other) == [], "the first one is alive"


async def test_a_dead_schedulers_requests_are_taken_over(
    queue: QueueDriver, intake: Intake, blocking: Redis
) -> None:
    dead = Intake(queue.client, blocking, queue.keys)
    await dead.open()
    await intake.open()
    await queue.submit("a", "b")
    assert ids(await dead.read(ROOM)) == ["a", "b"]
    await dead.close()
    assert ids(await taken_over(intake)) == ["a", "b"]
    assert await taken_over(intake) == []
    consumers = await queue.client.xinfo_consumers(queue.keys.intakes["standard"], DISPATCHERS)
    assert len(consumers) == 1, "nothing is left of the dead one"


async def test_a_take_over_that_another_scheduler_won_brings_nothing(
    queue: QueueDriver, intake: Intake, blocking: Redis
) -> None:
    dead, rival = (Intake(queue.client, blocking, queue.keys) for _ in range(2))
    for one in (dead, rival, intake):
        await one.open()
    await queue.submit("a")
    await dead.read(ROOM)
    await dead.close()
    key = queue.keys.intakes["standard"]
    assert ids(await taken_over(rival)) == ["a"]
    # As if it had looked at the consumers before the rival claimed.
    assert await intake._claim_from(dead._id, "standard", key, 9) == []


async def test_what_was_delivered_in_a_lost_reply_is_read_again(
    queue: QueueDriver, blocking: Redis
) -> None:
    lossy: Any = Lossy(blocking)
    intake = Intake(queue.client, lossy, queue.keys)
    await intake.open()
    await queue.submit("a", "b")
    assert ids(await intake.read({"interactive": 0, "standard": 1, "batch": 0})) == ["a"]
    lossy.lose = "xreadgroup"
    with pytest.raises(RedisConnectionError):
        await intake.read(ROOM)
    assert ids(await intake.read_again()) == ["b"], "and not what it holds already"
    assert await intake.read_again() == []


async def test_an_error_between_records_and_journals_loses_neither(
    queue: QueueDriver, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request has a journal to read, and that reply is lost."""
    await intake.open()
    await queue.join()
    await queue.submit("b")
    await queue.assign("b")
    await queue.submit("a")
    await queue.kill()
    await queue.reclaim()

    async def lost(*_: Any) -> None:
        raise RedisConnectionError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr("scheduler.intake.entries_of_all", lost)
        with pytest.raises(RedisConnectionError):
            await intake.read(ROOM)
    assert ids(await intake.read_again()) == ["a", "b"]


async def test_an_entry_that_its_request_has_no_more_is_dropped(
    queue: QueueDriver, intake: Intake
) -> None:
    """The server lost the request, and it was submitted anew."""
    await intake.open()
    await queue.submit("a")
    await queue.client.delete(queue.keys.request(RequestId("a")))
    await queue.submit("a")
    [arrival] = await intake.read(ROOM)
    assert arrival.queued == await queue.queued("a")
    assert await queue.queue() == ["a"]


async def test_an_entry_whose_request_needs_it_no_more_is_dropped(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    await queue.client.xadd(queue.keys.intakes["standard"], {"request_id": "never-heard-of"})
    await queue.client.xadd(queue.keys.intakes["standard"], {"nonsense": b"\xff"})
    await queue.submit("a")
    assert ids(await intake.read(ROOM)) == ["a"]
    assert await queue.queue() == ["a"]


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x92\x02\x00"])
async def test_an_undecodable_message_arrives_as_its_error(
    queue: QueueDriver, intake: Intake, message: bytes
) -> None:
    await intake.open()
    await queue.submit("a", message=message)
    [arrival] = await intake.read(ROOM)
    assert isinstance(arrival.request, WireError)


async def test_a_value_out_of_range_arrives_as_its_error(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    message = b"\x99\x01\xa1a\x93\xc0\xc0\xc0"
    await queue.submit("a", message=message + (await _rest_of_a_message(queue)))
    [arrival] = await intake.read(ROOM)
    assert isinstance(arrival.request, InvalidRequest)


async def _rest_of_a_message(queue: QueueDriver) -> bytes:
    """What follows the prompt in a request's message."""
    await queue.submit("model")
    message = (await queue.record("model"))["request"]
    await queue.cancel("model")
    return message.split(b"\x93\xa2Hi\xc0\xc0")[1]


async def test_a_reclaimed_request_comes_with_what_was_journaled(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.commit(tokens("a", 1, 0, 5, 6))
    await queue.commit(tokens("a", 1, 2, 7))
    await queue.kill()
    await queue.reclaim()
    [arrival] = await intake.read(ROOM)
    assert list(arrival.journaled.token_ids) == [5, 6, 7]
    assert arrival.journaled.text == "xxx"
    assert arrival.queued.fence == 2


async def test_a_damaged_journal_is_the_failure_of_its_request_alone(
    queue: QueueDriver, intake: Intake
) -> None:
    await intake.open()
    await queue.join()
    await queue.submit("a", "b")
    await queue.assign("a")
    await queue.commit(tokens("a", 1, 0, 5))
    journal = queue.keys.journal(RequestId("a"))
    await queue.client.xadd(journal, {"chunk": b"garbage"})
    await queue.kill()
    await queue.reclaim()
    arrivals = {arrival.queued.request_id: arrival for arrival in await intake.read(ROOM)}
    assert isinstance(arrivals[RequestId("a")].request, WireError)
    assert isinstance(arrivals[RequestId("b")].request, Request)


async def test_streams_that_vanish_are_made_again(queue: QueueDriver, intake: Intake) -> None:
    await intake.open()
    await queue.client.flushall()
    assert await taken_over(intake) == []
    assert await intake.read(ROOM) == []
    await queue.submit("a")
    assert ids(await intake.read(ROOM)) == ["a"]


async def test_a_settled_entry_is_not_held_any_more(queue: QueueDriver, intake: Intake) -> None:
    await intake.open()
    await queue.submit("a")
    [arrival] = await intake.read(ROOM)
    assert await intake.read_again() == []
    intake.settle(arrival.queued)
    assert ids(await intake.read_again()) == ["a"]
