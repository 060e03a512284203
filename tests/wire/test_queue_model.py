"""The queue's scripts against a model of them, under random operations.

Two groups, each with all its past lives (a dead one still writes), two schedulers with memories
that grow old, three requests at a time. After every operation the records on the server must be
those of the model, and what the design promises must hold: no request is lost, none ends twice,
fencing tokens only grow. At the end all work is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.queue_driver import QueueDriver, end, tokens
from wire.client import connect
from wire.ids import RequestId
from wire.messages import TerminalState
from wire.records import Journaled, journal_entry
from wire.scripts import Progress, Queued
from wire.streams import entries

Returned = TypeVar("Returned")
Life = tuple[str, int]

MAX_ATTEMPTS = 2
CREDITS = 2

AT_A_TIME = 3

groups = st.sampled_from(["g", "h"])
schedulers = st.sampled_from([0, 1])


@dataclass
class ModelRequest:
    """What the record should say."""

    streams: bool
    state: str = "queued"
    fence: int = 0
    attempts: int = 0
    num_journaled: int = 0
    owner: Life | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "assigned")


@dataclass
class ModelGroup:
    """One life of a group: what the server knows of it, and what its process believes."""

    alive: bool = True
    believes: dict[str, tuple[int, int]] = field(default_factory=dict)  # id -> fence, tokens


class Queue(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = self.run(self.connect(self.url))
        self.queue = QueueDriver(self.client)
        self.requests: dict[str, ModelRequest] = {}
        self.lives: dict[Life, ModelGroup] = {}
        self.epochs = {"g": 0, "h": 0}
        self.memories: list[dict[str, Queued]] = [{}, {}]
        self.results: list[tuple[str, str]] = []
        for group in self.epochs:
            self.start(group)
        for streams in (False, True):
            self.submit(streams)

    def run(self, work: Coroutine[Any, Any, Returned]) -> Returned:
        return self.runner.run(work)

    async def connect(self, url: str) -> Any:
        client = connect(url)
        await client.flushall()
        return client

    def finish(self, request_id: str, state: str) -> None:
        request = self.requests[request_id]
        request.state, request.owner, request.cancelled = state, None, False
        self.results.append((request_id, state))

    def some_request(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.requests)))

    @property
    def going_on(self) -> list[str]:
        return [name for name, request in self.requests.items() if not request.ended]

    @property
    def queued(self) -> list[str]:
        return [name for name, request in self.requests.items() if request.state == "queued"]

    # Producers

    @precondition(lambda self: len(self.going_on) < AT_A_TIME)
    @rule(streams=st.booleans())
    def submit(self, streams: bool) -> None:
        request_id = f"r{len(self.requests)}"
        assert self.run(self.queue.submit(request_id, stream=streams)) == ["new"]
        self.requests[request_id] = ModelRequest(streams)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        assert self.run(self.queue.submit(self.some_request(data))) == ["known"]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = self.some_request(data)
        request = self.requests[request_id]
        answer = self.run(self.queue.cancel(request_id))
        if request.state == "queued":
            assert answer == "cancelled"
            self.finish(request_id, "cancelled")
        elif request.state == "assigned":
            assert answer == "requested"
            request.cancelled = True
        else:
            assert answer == request.state

    # Schedulers

    @precondition(lambda self: self.queued)
    @rule(scheduler=schedulers)
    def read(self, scheduler: int) -> None:
        """Take note of what is queued; by the time it is sent, that may be long out of date."""
        for request_id in self.queued:
            self.memories[scheduler][request_id] = self.run(self.queue.queued(request_id))

    @precondition(lambda self: self.queued)
    @rule(scheduler=schedulers, group=groups)
    def read_and_assign(self, scheduler: int, group: str) -> None:
        self.read(scheduler)
        self.assign(scheduler, group, 1)

    @precondition(lambda self: any(self.memories))
    @rule(scheduler=schedulers, group=groups, size=st.integers(1, 3))
    def assign(self, scheduler: int, group: str, size: int) -> None:
        batch = list(self.memories[scheduler].values())[-size:]
        if not batch:
            return
        life = (group, self.epochs[group])
        outcome = self.run(self.queue.assign(*batch, group=group, epoch=life[1], credits=CREDITS))
        if not self.lives[life].alive:
            assert outcome == "gone"
            return
        held = sum(request.owner == life for request in self.requests.values())
        if held + len(batch) > CREDITS:
            assert outcome == "full"
            return
        expected = []
        for queued in batch:
            del self.memories[scheduler][queued.request_id]
            request = self.requests[queued.request_id]
            if request.state == "queued" and request.fence == queued.fence:
                expected.append(queued.request_id)
                request.state, request.owner = "assigned", life
                request.fence += 1
                belief = (request.fence, request.num_journaled)
                self.lives[life].believes[queued.request_id] = belief
        assert outcome == expected

    @precondition(lambda self: any(self.memories))
    @rule(scheduler=schedulers)
    def expire(self, scheduler: int) -> None:
        if not self.memories[scheduler]:
            return
        request_id, queued = self.memories[scheduler].popitem()
        num_ended = self.run(self.queue.scripts.reject([(queued, "expired", b"")]))
        request = self.requests[request_id]
        mine = request.state == "queued" and request.fence == queued.fence
        assert num_ended == mine
        if mine:
            self.finish(request_id, "expired")

    @rule(data=st.data(), leaving=st.booleans())
    def reclaim(self, data: st.DataObject, leaving: bool) -> None:
        """By a scheduler; or by the group itself, when it is `leaving`."""
        self.reclaim_life(data.draw(st.sampled_from(list(self.lives)[-4:])), leaving=leaving)

    def reclaim_life(self, life: Life, *, leaving: bool) -> None:
        group = self.lives[life]
        counts = self.run(self.queue.reclaim(*life, leaving=leaving, max_attempts=MAX_ATTEMPTS))
        if group.alive and not leaving:
            assert counts is None
            return
        group.alive = False
        taken = [name for name, request in self.requests.items() if request.owner == life]
        num_failed = 0
        for request_id in taken:
            request = self.requests[request_id]
            request.fence += 1
            request.attempts += not leaving
            if request.cancelled:
                self.finish(request_id, "cancelled")
            elif not leaving and request.attempts >= MAX_ATTEMPTS:
                self.finish(request_id, "failed")
                num_failed += 1
            else:
                request.state, request.owner = "queued", None
        assert counts == (len(taken), num_failed)

    # Groups

    @rule(group=groups)
    def start(self, group: str) -> None:
        """A group (re)starts; the life before it, if it still ran, is a zombie from now on."""
        self.epochs[group] += 1
        assert self.run(self.queue.join(group)) == self.epochs[group]
        self.lives[group, self.epochs[group]] = ModelGroup()

    @rule(group=groups)
    def lose_heartbeat(self, group: str) -> None:
        life = (group, self.epochs[group])
        self.run(self.queue.kill(*life))
        self.lives[life].alive = False

    @rule(group=groups)
    def crash_and_restart(self, group: str) -> None:
        self.lose_heartbeat(group)
        self.reclaim_life((group, self.epochs[group]), leaving=False)
        self.start(group)

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        """Also after a pause that was longer than the others' patience."""
        life = data.draw(st.sampled_from(sorted(self.lives)))
        answer = self.run(self.queue.beat(*life))
        assert (answer is not None) == self.lives[life].alive

    @precondition(lambda self: any(group.believes for group in self.lives.values()))
    @rule(
        num_tokens=st.integers(1, 2),
        state=st.sampled_from([None, None, "done", "failed", "cancelled", "expired"]),
        num_lives=st.integers(1, 4),
        num_writes=st.integers(1, 2),
    )
    def commit(
        self, num_tokens: int, state: TerminalState | None, num_lives: int, num_writes: int
    ) -> None:
        """Some lives of the groups, perhaps all but one long dead, write for one request each.

        Twice, where the first reply was lost.
        """
        busy = [(life, group) for life, group in self.lives.items() if group.believes]
        for life, group in busy[-num_lives:]:
            request_id, (fence, offset) = next(iter(group.believes.items()))
            progress = tokens(request_id, fence, offset, *range(num_tokens))
            if state is not None:
                progress = end(request_id, fence, state)
            for _ in range(num_writes):
                self.write(life, progress)

    def write(self, life: Life, progress: Progress) -> None:
        stale = self.run(self.queue.commit(progress, group=life[0], epoch=life[1]))
        request = self.requests[progress.request_id]
        believes = self.lives[life].believes
        if request.state != "assigned" or request.fence != progress.fence:
            assert stale == [progress.request_id]
            believes.pop(progress.request_id, None)
            return
        assert stale == []
        if progress.chunk and request.num_journaled == progress.offset:
            request.num_journaled += progress.num_tokens
            believes[progress.request_id] = (progress.fence, request.num_journaled)
        if progress.state is not None:
            believes.pop(progress.request_id, None)
            self.finish(progress.request_id, progress.state)

    # What must hold

    @invariant()
    def the_server_agrees_with_the_model(self) -> None:
        self.run(self.compare())

    async def compare(self) -> None:
        queued = await self.queue.queue()
        living = {(entry.group_id, entry.epoch) for entry in (await self.queue.scripts.fleet())[1]}
        for request_id, request in self.requests.items():
            record = await self.queue.record(request_id)
            assert record["state"].decode() == request.state
            assert int(record["fence"]) == request.fence, "and it never shrinks in the model"
            assert int(record["attempts"]) == request.attempts
            assert int(record.get("num_journaled", 0)) == request.num_journaled
            # Nothing is lost: what goes on is queued once, or held by a group that will be missed.
            assert queued.count(request_id) == (request.state == "queued")
            if request.state == "assigned":
                assert request.owner in living
                owned = f"{self.queue.keys.prefix}:group:{record['owner'].decode()}:owned"
                assert await self.client.sismember(owned, request_id)
            await self.compare_journal(request_id, request)
        # In no order: what a dead group held is taken from a set.
        assert sorted(await self.queue.ended()) == sorted(self.results)
        assert len(dict(self.results)) == len(self.results), "no request ends twice"

    async def compare_journal(self, request_id: str, request: ModelRequest) -> None:
        found = await entries(self.client, self.queue.keys.journal(RequestId(request_id)))
        ends = [fields[b"state"].decode() for _, fields in found if b"state" in fields]
        assert ends == ([request.state] if request.ended else [])
        if request.ended and not request.streams:
            assert len(found) == 1
        else:
            # Raises for a gap or a repetition.
            journaled = Journaled.of(journal_entry(*entry) for entry in found)
            assert len(journaled.token_ids) == request.num_journaled

    def teardown(self) -> None:
        """When the faults stop, all work ends: bury what there is, and serve the rest."""
        try:
            self.run(self.work_off())
        finally:
            self.run(self.client.aclose())
            self.runner.close()

    async def work_off(self) -> None:
        for group, epoch in self.lives:
            await self.queue.kill(group, epoch)
            await self.queue.reclaim(group, epoch)
        epoch = await self.queue.join("last")
        for request_id in await self.queue.queue():
            assert await self.queue.assign(request_id, group="last", epoch=epoch) == [request_id]
            fence = await self.queue.fence(request_id)
            assert await self.queue.commit(end(request_id, fence), group="last") == []
        ended = [request_id for request_id, _ in await self.queue.ended()]
        assert sorted(ended) == sorted(self.requests)


def test_the_scripts_are_the_state_machine_of_the_model(redis_url: str) -> None:
    Queue.url = redis_url
    run_state_machine_as_test(
        Queue,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
