"""Writing to real servers, one that has lost its last moments included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gpu_worker.committer import Committer
from gpu_worker.engine.stub import stub_model_card
from gpu_worker.ledger import Ledger
from gpu_worker.membership import Membership
from gpu_worker.rank_protocol import SequenceOutput
from gpu_worker.text import TextDecoder
from support.queue_driver import QueueDriver, open_queue
from wire.ids import GroupId, RequestId, token_ids
from wire.messages import Assignment, FinishReason, GroupStatus
from wire.records import Journaled, read_journal
from wire.sampling import SamplingParams
from wire.streams import entries

A = RequestId("a")
CARD = stub_model_card(name="m")
DECODER = TextDecoder(CARD.tokenizer_json)


class Group:
    """A group that holds request "a" and whose engine is this test."""

    def __init__(self, queue: QueueDriver, url: str) -> None:
        self.queue = queue
        self.aborted: list[RequestId] = []
        self.ledger = Ledger(DECODER, model="m", block_size=4)
        self.membership = Membership(
            url,
            queue.client,
            queue.keys,
            group_id=GroupId("g"),
            card=CARD,
            heartbeat_s=1.0,
            timeout_ms=60_000,
            max_crashes=3,
            status=lambda epoch: GroupStatus(GroupId("g"), epoch, "m", 1, 8, "healthy"),
        )
        self.committer = Committer(
            queue.scripts, self.ledger, self.membership, flush_s=0.0, abort=self._abort
        )

    async def _abort(self, request_ids: list[RequestId]) -> None:
        self.aborted += request_ids

    async def begin(self) -> None:
        await self.membership.join(asyncio.Event())
        await self.queue.submit(A, stream=True)
        await self.queue.assign(A)
        self.ledger.open(Assignment(A, 1, token_ids([1]), SamplingParams(), True))

    async def say(self, token: int, end: FinishReason | None = None) -> None:
        self.ledger.add([SequenceOutput(A, 1, token_ids([token]), finish_reason=end)])
        self.committer.wake()
        await self.committer.flush(asyncio.Event())

    async def mailed(self) -> bytes:
        """Where the inbox ends."""
        inbox = await entries(self.queue.client, self.queue.keys.inbox(GroupId("g"), self.epoch))
        return inbox[-1][0]

    @property
    def epoch(self) -> int:
        return self.membership.epoch

    async def journal(self) -> Journaled:
        found = await entries(self.queue.client, self.queue.keys.journal(A))
        return read_journal(found)


@pytest.fixture
async def group(redis_url: str) -> AsyncIterator[Group]:
    async with open_queue(redis_url) as queue:
        group = Group(queue, redis_url)
        await group.begin()
        yield group
        await group.membership.leave()


async def test_tokens_are_journaled_as_they_come_and_what_is_not_ours_is_stopped(
    group: Group,
) -> None:
    await group.say(5)
    await group.say(6)
    assert list((await group.journal()).token_ids) == [5, 6]
    await group.queue.reclaim(how="crashed")
    await group.say(7)
    assert group.aborted == [A]
    assert len(group.ledger) == 0


async def test_what_could_not_be_written_is_written_with_the_next(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*args: Any) -> list[RequestId]:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(group.queue.scripts, "commit", unreachable)
        with pytest.raises(RedisConnectionError):
            await group.say(5)
        await group.committer.flush_last()  # gives up, and is no reason to fail
    await group.committer.flush(asyncio.Event())
    assert list((await group.journal()).token_ids) == [5]


async def test_a_journal_that_has_lost_its_end_gets_it_again(group: Group) -> None:
    for token in (5, 6, 7):
        await group.say(token)
    before = await group.journal()
    for entry_id, _ in (await entries(group.queue.client, group.queue.keys.journal(A)))[1:]:
        await group.queue.client.xdel(group.queue.keys.journal(A), entry_id)
    await group.queue.client.hset(group.queue.keys.request(A), "num_journaled", "1")
    assert await group.committer.reconcile(await group.mailed())
    await group.say(8)
    after = await group.journal()
    assert list(after.token_ids) == [5, 6, 7, 8]
    assert after.text.startswith(before.text)
    await group.say(9, end="length")
    assert await group.queue.state(A) == "done"


async def test_a_request_that_the_server_has_forgotten_to_be_done_goes_back(group: Group) -> None:
    await group.queue.submit("forgotten")
    await group.queue.assign("forgotten")
    assert not await group.committer.reconcile(b"0-0"), "it may still be in the mail"
    assert await group.committer.reconcile(await group.mailed())
    assert await group.queue.state("forgotten") == "queued"
    assert await group.queue.state(A) == "assigned"


async def test_no_commit_overtakes_a_reconciliation(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the journal would be longer than the answer says by the time it is heeded."""
    await group.say(5)
    reconcile = group.queue.scripts.reconcile
    answered, heed = asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        reply = await reconcile(*args)
        answered.set()
        await heed.wait()
        return reply

    monkeypatch.setattr(group.queue.scripts, "reconcile", slow)
    reconciling = asyncio.create_task(group.committer.reconcile(await group.mailed()))
    await answered.wait()
    saying = asyncio.create_task(group.say(6))
    await asyncio.wait((saying,), timeout=0.1)
    assert not saying.done()
    heed.set()
    assert await reconciling
    await saying
    assert list((await group.journal()).token_ids) == [5, 6]
