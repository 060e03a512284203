"""Each state change of the queue, alone, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.queue_driver import LONG_MS, QueueDriver, end, open_queue, tokens
from wire.codec import decode
from wire.ids import GroupId, RequestId
from wire.keys import DISPATCHERS
from wire.messages import GroupStatus
from wire.records import read_journal
from wire.scripts import Ending, Reconciled
from wire.streams import ensure_group, entries, id_order, read_group


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


async def journaled(queue: QueueDriver, request_id: str) -> list[int]:
    found = await entries(queue.client, queue.keys.journal(RequestId(request_id)))
    return list(read_journal(found).token_ids)


# Submit


async def test_a_new_request_is_queued_in_its_class(queue: QueueDriver) -> None:
    assert await queue.submit("a", priority="interactive") == ["new"]
    assert await queue.queue("interactive") == ["a"]
    record = await queue.record("a")
    assert record["state"] == b"queued"
    assert record["fence"] == b"0"
    assert "deadline_ms" not in record


async def test_the_same_id_again_is_known_and_changes_nothing(queue: QueueDriver) -> None:
    await queue.submit("a")
    before = await queue.record("a")
    assert await queue.submit("a", "b", "b", stream=True) == ["known", "new", "known"]
    assert await queue.record("a") == before
    assert await queue.queue() == ["a", "b"]


async def test_an_ended_request_is_known_as_long_as_its_result(queue: QueueDriver) -> None:
    await queue.submit("a")
    await queue.cancel("a")
    assert await queue.submit("a") == ["known"]
    await queue.client.delete(queue.keys.request(RequestId("a")))
    assert await queue.submit("a") == ["new"]


async def test_intake_is_bounded_over_all_classes(queue: QueueDriver) -> None:
    await queue.submit("a", priority="batch", max_queued=3)
    assert await queue.submit("b", "c", "d", "a", max_queued=3) == ["new", "new", "full", "known"]
    assert await queue.state("d") is None
    await queue.join()
    await queue.assign("a")
    assert await queue.submit("d", max_queued=3) == ["new"]


async def test_unread_results_hold_back_their_producer_alone(queue: QueueDriver) -> None:
    await queue.submit("a", "b")
    await queue.cancel("a")
    await queue.cancel("b")
    assert await queue.submit("c", max_unread=2) == ["full"]
    assert await queue.submit("c", max_unread=2, reply_to="other") == ["new"]
    await queue.client.delete(queue.keys.results("results"))
    assert await queue.submit("d", max_unread=2) == ["new"]


async def test_a_deadline_counts_from_the_submission_on_the_servers_clock(
    queue: QueueDriver,
) -> None:
    await queue.submit("a", timeout_ms=1500)
    record = await queue.record("a")
    assert int(record["deadline_ms"]) - int(record["submitted_ms"]) == 1500
    seconds, microseconds = await queue.client.time()
    now_ms = seconds * 1000 + microseconds // 1000
    assert 0 <= now_ms - int(record["submitted_ms"]) < 60_000


# Assign


async def test_an_assignment_bumps_the_fence_and_leaves_the_queue(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", "b")
    assert await queue.assign("a", "b") == ["a", "b"]
    assert await queue.queue() == []
    record = await queue.record("a")
    epoch = await queue.epoch()
    assert (record["state"], record["fence"]) == (b"assigned", b"1")
    assert record["owner"] == f"g:{epoch}".encode()
    [(_, fields)] = await entries(queue.client, queue.keys.inbox(GroupId("g"), epoch))
    assert list(fields) == [b"batch_id", b"assignment:1:a", b"assignment:1:b"]


async def test_nothing_is_assigned_to_a_group_that_is_gone(queue: QueueDriver) -> None:
    epoch = await queue.join()
    await queue.submit("a")
    assert await queue.assign("a", epoch=epoch + 1) == "gone"
    await queue.kill()
    assert await queue.assign("a") == "gone"
    assert await queue.state("a") == "queued"


async def test_credits_are_never_exceeded(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", "b", "c")
    assert await queue.assign("a", "b", "c", credits=2) == "full"
    assert await queue.assign("a", "b", credits=2) == ["a", "b"]
    assert await queue.assign("c", credits=2) == "full"
    await queue.commit(end("a", 1))
    assert await queue.assign("c", credits=2) == ["c"]


async def test_of_two_schedulers_one_gets_the_request(queue: QueueDriver) -> None:
    await queue.join()
    await queue.join("h")
    await queue.submit("a", "b")
    a, b = await queue.queued("a"), await queue.queued("b")
    assert await queue.assign(a) == ["a"]
    assert await queue.assign(a, b, group="h") == ["b"], "the loser's batch goes without it"
    assert (await queue.record("a"))["owner"].startswith(b"g:")


async def test_a_request_cancelled_on_the_way_is_left_out(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    a = await queue.queued("a")
    await queue.cancel("a")
    assert await queue.assign(a) == []
    assert not await queue.client.exists(queue.keys.inbox(GroupId("g"), await queue.epoch()))
    assert [entry.num_owned for entry in (await queue.scripts.fleet())[1]] == [0]


async def test_a_repeated_assignment_finds_it_done(queue: QueueDriver) -> None:
    """The reply to the first one was lost."""
    await queue.join()
    await queue.submit("a")
    a = await queue.queued("a")
    assert await queue.assign(a) == ["a"]
    assert await queue.assign(a) == []
    assert await queue.fence("a") == 1
    assert await queue.client.xlen(queue.keys.inbox(GroupId("g"), await queue.epoch())) == 1


# Commit


async def test_chunks_append_to_the_journal_in_order(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", "b", stream=True)
    await queue.assign("a", "b")
    assert await queue.commit(tokens("a", 1, 0, 5, 6), tokens("b", 1, 0, 9)) == []
    assert await queue.commit(tokens("a", 1, 2, 7)) == []
    assert await journaled(queue, "a") == [5, 6, 7]
    assert await journaled(queue, "b") == [9]


async def test_a_chunk_that_is_sent_again_changes_nothing(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", stream=True)
    await queue.assign("a")
    await queue.commit(tokens("a", 1, 0, 5, 6))
    assert await queue.commit(tokens("a", 1, 0, 5, 6)) == []
    assert await queue.commit(tokens("a", 1, 7, 1)) == [], "nor does one behind a gap"
    assert await journaled(queue, "a") == [5, 6]


async def test_a_stale_fence_changes_nothing_and_is_told(queue: QueueDriver) -> None:
    await queue.join()
    await queue.join("h")
    await queue.submit("a", stream=True)
    await queue.assign("a")
    await queue.kill()
    await queue.reclaim()
    await queue.assign("a", group="h")
    before = await queue.record("a")
    assert await queue.commit(tokens("a", 1, 0, 5), end("nobody", 1)) == ["a", "nobody"]
    assert await queue.commit(end("a", 1)) == ["a"]
    assert await queue.record("a") == before
    assert await journaled(queue, "a") == []
    assert await queue.ended() == []


async def test_the_end_is_written_once(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    assert await queue.commit(end("a", 1)) == []
    before = await queue.record("a")
    assert await queue.commit(end("a", 1, "failed")) == ["a"]
    assert await queue.record("a") == before
    assert await queue.ended() == [("a", "done")]
    result = await queue.result("a")
    assert result is not None
    assert result.text == "by 1"
    assert result.finished_ms >= result.submitted_ms > 0
    assert not {"request", "entry", "owner", "cancelled"} & before.keys()


async def test_what_has_ended_lives_as_long_as_its_producer_said(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", result_ttl_ms=5000)
    await queue.assign("a")
    await queue.commit(end("a", 1))
    request_id = RequestId("a")
    for key in (queue.keys.request(request_id), queue.keys.journal(request_id)):
        assert 0 < await queue.client.pttl(key) <= 5000
    assert 0 < await queue.client.pttl(queue.keys.results("results")) <= 5000


async def test_a_shared_results_stream_lives_as_long_as_any_of_its_results(
    queue: QueueDriver,
) -> None:
    await queue.submit("a", result_ttl_ms=LONG_MS)
    await queue.submit("b", result_ttl_ms=1000)
    await queue.cancel("a")
    await queue.cancel("b")
    assert await queue.client.pttl(queue.keys.results("results")) > 1000


async def test_a_streams_journal_stays_until_its_end_and_others_are_emptied(
    queue: QueueDriver,
) -> None:
    await queue.join()
    await queue.submit("a", stream=True)
    await queue.submit("b")
    await queue.assign("a", "b")
    await queue.commit(tokens("a", 1, 0, 5), tokens("b", 1, 0, 6))
    await queue.commit(end("a", 1), end("b", 1))
    lengths = [
        await queue.client.xlen(queue.keys.journal(RequestId(request_id))) for request_id in "ab"
    ]
    assert lengths == [2, 1]


async def test_journal_ids_go_on_rising_when_the_journal_is_emptied(queue: QueueDriver) -> None:
    """A reader in the middle of it waits for an id above the last that it saw."""
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    key = queue.keys.journal(RequestId("a"))
    seen = b"0-0"
    for offset in range(3):
        await queue.commit(tokens("a", 1, offset, 5))
        seen = (await entries(queue.client, key))[-1][0]
    await queue.commit(end("a", 1))
    [(last, fields)] = await entries(queue.client, key)
    assert fields == {b"state": b"done"}
    assert id_order(last) > id_order(seen)


# Cancel and reject


async def test_cancel_ends_what_is_queued_at_once(queue: QueueDriver) -> None:
    await queue.submit("a")
    assert await queue.cancel("a") == "cancelled"
    assert await queue.queue() == []
    assert await queue.ended() == [("a", "cancelled")]
    assert await queue.cancel("a") == "cancelled"
    assert await queue.ended() == [("a", "cancelled")]


async def test_cancel_tells_the_group_of_what_is_assigned(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    assert await queue.cancel("a") == "requested"
    [_, (_, fields)] = await entries(
        queue.client, queue.keys.inbox(GroupId("g"), await queue.epoch())
    )
    assert fields == {b"cancel": b"a"}
    assert await queue.commit(end("a", 1, "cancelled")) == []
    assert await queue.ended() == [("a", "cancelled")]


async def test_cancel_and_completion_race_for_one_result(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.cancel("a")
    await queue.commit(end("a", 1, "done"))
    assert await queue.cancel("a") == "done"
    assert await queue.ended() == [("a", "done")]


async def test_a_cancellation_that_dies_with_its_group_still_counts(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.cancel("a")
    await queue.kill()
    assert await queue.reclaim() == (1, 0)
    assert await queue.ended() == [("a", "cancelled")]
    assert await queue.queue() == []


async def test_an_unknown_request_cannot_be_cancelled(queue: QueueDriver) -> None:
    assert await queue.cancel("a") == "unknown"
    assert await queue.client.keys() == []


async def test_reject_ends_what_is_queued_under_that_fence(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", "b")
    a, b = await queue.queued("a"), await queue.queued("b")
    await queue.assign(b)
    assert await queue.scripts.reject([Ending(a, "failed", b"1"), Ending(b, "failed", b"2")]) == 1
    assert await queue.state("b") == "assigned"
    assert await queue.ended() == [("a", "failed")]
    assert await queue.scripts.reject([Ending(a, "expired", b"3")]) == 0
    assert await queue.ended() == [("a", "failed")]


# Groups


async def test_a_dead_groups_requests_are_queued_again_in_their_class(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", priority="batch")
    await queue.assign("a")
    await queue.kill()
    assert await queue.reclaim() == (1, 0)
    assert await queue.queue("batch") == ["a"]
    record = await queue.record("a")
    assert (record["fence"], record["num_crashes"]) == (b"2", b"1")
    assert (await queue.scripts.fleet())[1] == []
    assert await queue.reclaim() == (0, 0), "once is enough"


async def test_a_living_group_keeps_its_requests(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    assert await queue.reclaim() is None
    assert await queue.state("a") == "assigned"
    assert await queue.reclaim(how="crashed") == (1, 0), "unless it says itself that it crashed"


async def test_a_request_that_crashes_its_group_whenever_it_is_alone_is_dead_lettered(
    queue: QueueDriver,
) -> None:
    await queue.submit("a")
    for attempt in range(1, 4):
        await queue.join()
        await queue.assign("a")
        await queue.commit(tokens("a", await queue.fence("a"), attempt - 1, 7))
        await queue.kill()
        assert await queue.reclaim() == (1, int(attempt == 3))
    assert await queue.ended() == [("a", "failed")]
    assert await journaled(queue, "a") == [7, 7, 7], "nobody else has what it generated"
    letter = await queue.dead_letter("a")
    assert letter["reason"] == b"worker_lost"
    assert (letter["num_crashes"], letter["num_journaled"]) == (b"3", b"3")
    assert letter["request"], "what it takes to submit it again"


async def test_neighbours_of_a_crash_are_no_culprits(queue: QueueDriver) -> None:
    """Whose fault it was shows only when they are served apart."""
    await queue.submit("a", "b")
    for attempt in range(1, 6):
        await queue.join()
        await queue.assign("a", "b")
        await queue.kill()
        assert await queue.reclaim() == (2, 0)
        record = await queue.record("a")
        assert record["num_crashes"] == str(attempt).encode()
        assert record["num_neighbours"] == b"1"


async def test_an_orderly_leave_counts_for_nothing(queue: QueueDriver) -> None:
    """Not even for a request that would not bear one more crash."""
    await queue.submit("a")
    for how in ("crashed", "crashed", "leaving", "leaving"):
        await queue.join()
        await queue.assign("a")
        assert await queue.reclaim(how=how) == (1, 0)
    assert (await queue.record("a"))["num_crashes"] == b"2"


async def test_a_large_group_is_reclaimed_in_pieces(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit(*"abcde")
    await queue.assign(*"abcde")
    await queue.kill()
    assert await queue.reclaim(limit=2) == (2, 0)
    [entry] = (await queue.scripts.fleet())[1]
    assert entry.num_owned == 3, "whoever goes on with it must find it"
    assert await queue.beat() is None, "there is no way back"
    assert await queue.beat(first=True) is None
    assert [await queue.reclaim(limit=2) for _ in range(2)] == [(2, 0), (1, 0)]
    assert sorted(await queue.queue()) == list("abcde")
    assert (await queue.scripts.fleet())[1] == []


async def test_requests_that_ended_or_moved_on_are_not_reclaimed(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.commit(end("a", 1))
    owned = f"{{test:0}}:group:g:{await queue.epoch()}:owned"
    await queue.client.sadd(owned, "a", "never-heard-of")
    await queue.client.pexpire(owned, LONG_MS)
    await queue.kill()
    assert await queue.reclaim() == (2, 0)
    assert await queue.ended() == [("a", "done")]
    assert await queue.queue() == []


async def test_every_start_has_an_epoch_of_its_own(queue: QueueDriver) -> None:
    first, second = await queue.join(), await queue.join()
    assert second > first
    await queue.client.pexpire("{test:0}:epoch:g", 1000)
    await queue.beat()
    assert await queue.client.pttl("{test:0}:epoch:g") > 1000, "a group outlives its counter"
    await queue.client.delete("{test:0}:epoch:g")
    await wait_for_next_ms(queue)
    assert await queue.join() > second, "also on a server that has lost it"


async def wait_for_next_ms(queue: QueueDriver) -> None:
    before = await queue.client.time()
    while (await queue.client.time())[1] // 1000 == before[1] // 1000:
        pass


async def test_a_heartbeat_keeps_a_group_alive_and_tells_the_time(queue: QueueDriver) -> None:
    epoch = await queue.join(timeout_ms=1000)
    server_ms = await queue.beat(timeout_ms=LONG_MS)
    now_ms, [entry] = await queue.scripts.fleet()
    assert server_ms is not None
    assert 0 <= now_ms - server_ms < LONG_MS
    assert entry.lease_until_ms == server_ms + LONG_MS
    assert (entry.group_id, entry.epoch, entry.num_owned) == ("g", epoch, 0)
    assert decode(GroupStatus, entry.status or b"").credits == 8


async def test_a_late_beat_renews_the_lease(queue: QueueDriver) -> None:
    """As long as nobody has declared the group dead: a slow network is no reason to start over."""
    await queue.join()
    await queue.kill()
    assert await queue.beat() is not None
    assert await queue.reclaim() is None


async def test_a_group_that_was_declared_dead_is_told_so(queue: QueueDriver) -> None:
    await queue.join()
    await queue.kill()
    await queue.reclaim()
    assert await queue.beat() is None
    assert (await queue.scripts.fleet())[1] == []


async def test_a_group_gives_back_what_it_knows_nothing_of(queue: QueueDriver) -> None:
    """A server that has lost its last second holds it to requests that it finished in that."""
    epoch = await queue.join()
    await queue.submit("a", "b", "c")
    await queue.assign("a", "b")
    await queue.commit(tokens("a", 1, 0, 5, 6))
    reconcile, g, a = queue.scripts.reconcile, GroupId("g"), RequestId("a")
    inbox = queue.keys.inbox(g, epoch)
    assert await reconcile(g, epoch, b"0-0", []) is None, "it is all in the mail"
    read = (await entries(queue.client, inbox))[-1][0]
    assert await reconcile(g, epoch, read, [a]) == Reconciled(1, {a: 2})
    assert await queue.state("a") == "assigned"
    assert (await queue.record("b"))["num_crashes"] == b"0"
    assert await queue.queue() == ["c", "b"]
    assert await queue.commit(tokens("b", 1, 0, 5)) == ["b"], "its fence is another one now"
    assert await reconcile(g, epoch, read, [a]) == Reconciled(0, {a: 2})


# Bisecting


async def test_an_exclusive_batch_has_its_group_for_itself(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a", "b", "c", "d")
    assert await queue.assign("a") == ["a"]
    assert await queue.assign("b", "c", exclusive=True) == "full", "not beside another one"
    assert await queue.assign("d") == "full", "which is to end soon"
    await queue.commit(end("a", 1))
    assert await queue.assign("b", "c", exclusive=True) == ["b", "c"]
    assert [entry.exclusive for entry in (await queue.scripts.fleet())[1]] == [True]
    assert await queue.assign("d") == "full"
    assert await queue.assign("d", exclusive=True) == "full"
    await queue.commit(end("b", 1), end("c", 1))
    assert [entry.exclusive for entry in (await queue.scripts.fleet())[1]] == [False]
    assert await queue.assign("d") == ["d"]


# Retry


async def fail_once(queue: QueueDriver, request_id: str = "a") -> None:
    await queue.assign(request_id)
    assert await queue.commit(end(request_id, await queue.fence(request_id), "retry")) == []


async def make_due(queue: QueueDriver, request_id: str = "a") -> None:
    await queue.client.zadd(queue.keys.delayed, {request_id: 1}, xx=True)


async def test_after_an_error_a_request_waits_and_is_queued_again(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.commit(tokens("a", 1, 0, 5))
    await queue.commit(end("a", 1, "retry"))
    assert await queue.state("a") == "delayed"
    assert [entry.num_owned for entry in (await queue.scripts.fleet())[1]] == [0]
    assert await queue.retry(delay_ms=LONG_MS, max_delay_ms=LONG_MS) == (0, 0)
    assert await queue.retry() == (0, 0), "its time has not come"
    await make_due(queue)
    assert await queue.retry() == (1, 0)
    record = await queue.record("a")
    assert (record["state"], record["num_errors"], record["num_crashes"]) == (b"queued", b"1", b"0")
    assert await journaled(queue, "a") == [5], "it goes on from there"
    assert await queue.queue() == ["a"]


async def test_the_wait_doubles_with_each_error_up_to_a_limit(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    for delay_s in (10, 20, 40, 45):
        await fail_once(queue)
        await queue.retry(delay_ms=10_000, max_delay_ms=45_000, max_errors=9)
        seconds, microseconds = await queue.client.time()
        due = await queue.client.zscore(queue.keys.delayed, "a")
        assert due is not None
        assert 0 <= seconds * 1000 + microseconds / 1000 + delay_s * 1000 - due < 5000
        await make_due(queue)
        await queue.retry()


async def test_a_request_that_ran_out_of_retries_is_dead_lettered(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await fail_once(queue)
    await queue.retry()
    await make_due(queue)
    await queue.retry()
    await fail_once(queue)
    assert await queue.retry(max_errors=2) == (0, 1)
    assert await queue.ended() == [("a", "failed")]
    assert (await queue.dead_letter("a"))["reason"] == b"retries_exhausted"
    result = await queue.result("a")
    assert result is not None
    assert result.text.startswith("by "), "the last attempt's own error"
    assert await queue.retry() == (0, 0)


async def test_a_delayed_request_can_be_cancelled(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await fail_once(queue)
    assert await queue.cancel("a") == "cancelled"
    assert await queue.retry() == (0, 0)
    assert await queue.ended() == [("a", "cancelled")]


async def test_a_cancelled_request_is_not_tried_again(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await queue.assign("a")
    await queue.cancel("a")
    await queue.commit(end("a", 1, "retry"))
    assert await queue.ended() == [("a", "cancelled")]


async def test_a_wait_ends_with_the_deadline(queue: QueueDriver) -> None:
    """Its scheduler then ends it as expired, rather than minutes later."""
    await queue.join()
    await queue.submit("a", timeout_ms=5000)
    await fail_once(queue)
    await queue.retry(delay_ms=LONG_MS, max_delay_ms=LONG_MS)
    deadline = int((await queue.record("a"))["deadline_ms"])
    assert await queue.client.zscore(queue.keys.delayed, "a") == deadline


async def test_delayed_requests_count_as_queued(queue: QueueDriver) -> None:
    await queue.join()
    await queue.submit("a")
    await fail_once(queue)
    assert await queue.submit("b", max_queued=1) == ["full"]


# Dead letters


async def test_what_cannot_be_decoded_is_dead_lettered(queue: QueueDriver) -> None:
    await queue.submit("a", message=b"nonsense")
    a = await queue.queued("a")
    assert await queue.scripts.reject([Ending(a, "failed", b"", dead="wire_error")]) == 1
    letter = await queue.dead_letter("a")
    assert (letter["reason"], letter["request"]) == (b"wire_error", b"nonsense")
    assert await queue.ended() == [("a", "failed")]


async def test_a_dead_letter_becomes_one_new_request(queue: QueueDriver) -> None:
    await queue.submit("a", priority="batch", stream=True, timeout_ms=5000)
    a = await queue.queued("a")
    await queue.scripts.reject([Ending(a, "failed", b"", dead="wire_error")])
    old, new, message = RequestId("a"), RequestId("a.replay-1"), b"new"
    assert await queue.scripts.replay(old, new, message, max_queued=0) == "full"
    assert await queue.scripts.replay(old, old, message, max_queued=1) == "known"
    assert await queue.scripts.replay(old, new, message, max_queued=1) == "new"
    assert await queue.scripts.replay(old, new, message, max_queued=9) == "gone"
    assert await queue.queue("batch") == ["a.replay-1"]
    record = await queue.record("a.replay-1")
    assert (record["request"], record["stream"], record["fence"]) == (b"new", b"1", b"0")
    assert int(record["deadline_ms"]) - int(record["submitted_ms"]) == 5000
    assert await queue.dead_letter("a") == {}
    assert await queue.state("a") == "failed", "the first one keeps its result"


async def test_the_oldest_of_too_many_dead_letters_go(queue: QueueDriver) -> None:
    await queue.client.zadd(queue.keys.dead_letters, {f"old-{i}": i for i in range(10_000)})
    await queue.client.hset(queue.keys.dead_letter(RequestId("old-0")), "reason", "worker_lost")
    await queue.submit("a")
    a = await queue.queued("a")
    await queue.scripts.reject([Ending(a, "failed", b"", dead="wire_error")])
    assert await queue.client.zcard(queue.keys.dead_letters) == 10_000
    assert await queue.dead_letter("old-0") == {}
    assert await queue.client.zscore(queue.keys.dead_letters, "a") is not None


async def test_a_consumer_is_dropped_only_when_nothing_is_pending(queue: QueueDriver) -> None:
    key = queue.keys.intakes["standard"]
    await queue.submit("a")
    await ensure_group(queue.client, key, DISPATCHERS, ttl_ms=LONG_MS)
    found = await read_group(queue.client, DISPATCHERS, "s", {key: ">"}, count=1, ttl_ms=LONG_MS)
    assert not await queue.scripts.drop_consumer(key, DISPATCHERS, "s")
    await queue.client.xack(key, DISPATCHERS, found[key][0][0])
    assert await queue.scripts.drop_consumer(key, DISPATCHERS, "s")
    assert await queue.client.xinfo_consumers(key, DISPATCHERS) == []
    assert await queue.scripts.drop_consumer("{test:0}:nothing", DISPATCHERS, "s")


async def test_scripts_come_back_after_they_were_flushed(queue: QueueDriver) -> None:
    await queue.submit("a")
    await queue.client.script_flush()
    assert await queue.submit("a") == ["known"]
