"""Dead letters: seen in order, replayed once, dropped; on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from producer.dead_letters import DeadLetters
from support.dead_requests import let_die
from support.queue_driver import NAMESPACE, QueueDriver, open_queue, tokens
from wire.codec import decode
from wire.errors import ForebayError, IntakeFull, ResultGone, ServerUnreachable, WireError
from wire.keys import MAX_NAME_CHARS
from wire.messages import Prompt, Request
from wire.scripts import Scripts


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


@pytest.fixture
async def letters(redis_url: str) -> AsyncIterator[DeadLetters]:
    async with DeadLetters(redis_url, namespace=NAMESPACE, max_queued=10) as opened:
        yield opened


async def submit_and_die(queue: QueueDriver, *request_ids: str, **options: Any) -> None:
    await queue.submit(*request_ids)
    await let_die(queue, *request_ids, **options)


async def message(queue: QueueDriver, request_id: str) -> Request:
    return decode(Request, (await queue.record(request_id))["request"])


# Looking


async def test_a_letter_tells_all_about_a_request_that_killed_its_group(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await queue.submit("poison", priority="batch", stream=True)
    epoch = await queue.join("g")
    await queue.assign("poison")
    await queue.commit(tokens("poison", await queue.fence("poison"), 0, 1, 2, 3))
    await queue.kill("g", epoch)
    await queue.reclaim("g", epoch, max_crashes=1)

    letter = await letters.show("poison")
    assert (letter.request_id, letter.reason) == ("poison", "worker_lost")
    assert (letter.num_crashes, letter.num_errors, letter.num_journaled) == (1, 0, 3)
    assert (letter.priority, letter.stream) == ("batch", True)
    assert letter.request is not None
    assert letter.request.prompt == Prompt(text="Hi")
    assert 0 < letter.submitted_ms <= letter.died_ms
    assert 0 <= letter.age_s < 60


async def test_letters_come_newest_first_and_no_more_than_asked_for(
    queue: QueueDriver, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.dead_letters._PAGE", 2)
    ids = [f"r{i}" for i in range(5)]
    await submit_and_die(queue, *ids, message="too bad")
    newest = await letters.newest(3)
    assert [letter.request_id for letter in newest] == ["r4", "r3", "r2"]
    assert {letter.message for letter in newest} == {"too bad"}
    assert {letter.request for letter in newest} == {None}, "prompts stay where they are"
    assert await letters.ids() == ids[::-1]


async def test_letters_are_chosen_by_their_reason(queue: QueueDriver, letters: DeadLetters) -> None:
    await submit_and_die(queue, "a", "b")
    await submit_and_die(queue, "c", reason="wire_error")
    assert [letter.request_id for letter in await letters.newest(reason="wire_error")] == ["c"]
    assert await letters.ids(reason="worker_lost") == ["b", "a"]


async def test_a_letter_that_has_outlived_its_time_is_not_listed(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await submit_and_die(queue, "old", "new")
    await queue.client.delete(queue.keys.dead_letter((await letters.ids())[1]))
    assert await letters.ids() == ["new"]


@pytest.mark.parametrize("action", ["show", "replay"])
async def test_what_is_no_dead_letter_is_named(letters: DeadLetters, action: str) -> None:
    with pytest.raises(ResultGone, match="no dead letter 'nobody'"):
        await getattr(letters, action)("nobody")


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ServerUnreachable):
        async with DeadLetters("redis://127.0.0.1:1"):
            pass


# Replaying


async def test_a_replay_is_a_new_request_with_the_old_message(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await queue.submit("r", timeout_ms=50_000, priority="batch", reply_to="mine", model="m")
    before = await message(queue, "r")
    await let_die(queue, "r")
    assert await letters.replay("r") == "r.replay-1"

    assert await queue.queue("batch") == ["r.replay-1"]
    after, record = await message(queue, "r.replay-1"), await queue.record("r.replay-1")
    assert (after.request_id, after.prompt, after.model) == ("r.replay-1", before.prompt, "m")
    assert int(record["deadline_ms"]) - int(record["submitted_ms"]) == 50_000, "counted anew"
    assert (record["num_crashes"], record["reply_to"]) == (b"0", b"mine")
    assert await queue.state("r") == "failed", "whoever waited for it was told"
    assert await letters.ids() == []


async def test_replaying_at_the_same_time_makes_one_request(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await submit_and_die(queue, "r")
    outcomes = await asyncio.gather(
        *(letters.replay("r") for _ in range(8)), return_exceptions=True
    )
    assert await queue.queue() == ["r.replay-1"]
    assert "r.replay-1" in outcomes
    assert all(isinstance(other, ResultGone) for other in outcomes if other != "r.replay-1")


async def test_a_replay_whose_reply_was_lost_has_happened_once(
    queue: QueueDriver, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit_and_die(queue, "r")
    replay, lost = Scripts.replay, [True]

    async def replay_and_lose(self: Scripts, *args: Any, **options: Any) -> str:
        outcome = await replay(self, *args, **options)
        if lost.pop() if lost else False:
            raise RedisConnectionError("Connection closed by server.")
        return outcome

    monkeypatch.setattr(Scripts, "replay", replay_and_lose)
    assert await letters.replay("r") == "r.replay-1"
    assert await queue.queue() == ["r.replay-1"]


async def test_a_replay_that_dies_too_is_replayed_under_the_next_number(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await submit_and_die(queue, "r")
    await let_die(queue, await letters.replay("r"))
    assert await letters.replay("r.replay-1") == "r.replay-2"


async def test_an_id_that_is_taken_is_not_given_again(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await submit_and_die(queue, "r")
    await queue.submit("r.replay-1")
    assert await letters.replay("r") == "r.replay-2"
    assert await queue.queue() == ["r.replay-1", "r.replay-2"]


async def test_a_long_id_is_shortened_to_what_an_id_may_be(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    twins = ["x" * (MAX_NAME_CHARS - 1) + end for end in "ab"]
    await submit_and_die(queue, *twins)
    new_ids = [await letters.replay(twin) for twin in twins]
    assert [len(new_id) for new_id in new_ids] == [MAX_NAME_CHARS] * 2
    assert await queue.queue() == new_ids
    assert len(set(new_ids)) == 2


async def test_what_cannot_be_decoded_is_shown_and_stays(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await queue.submit("r", message=b"junk")
    await let_die(queue, "r", reason="wire_error")
    letter = await letters.show("r")
    assert letter.request is None
    assert letter.unreadable
    with pytest.raises(WireError, match=r"'r' cannot be replayed: .*dead-letters drop r"):
        await letters.replay("r")
    assert await letters.ids() == ["r"]


async def test_a_full_queue_takes_no_replay_and_the_letter_stays(
    queue: QueueDriver, letters: DeadLetters
) -> None:
    await submit_and_die(queue, "r")
    await queue.submit(*(f"q{i}" for i in range(10)))
    with pytest.raises(IntakeFull, match="limit of 10"):
        await letters.replay("r")
    assert await letters.ids() == ["r"]


# Dropping


async def test_what_is_dropped_is_gone(
    queue: QueueDriver, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.dead_letters._PAGE", 2)
    await submit_and_die(queue, "a", "b", "c", "d")
    assert await letters.drop("a", "nobody", "b", "c") == ["a", "b", "c"]
    assert await letters.drop("a") == []
    assert await letters.ids() == ["d"]
    with pytest.raises(ForebayError):
        await letters.show("a")
