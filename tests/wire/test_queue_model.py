"""The queue's scripts against their model, under random operations.

Two groups, each with all its past lives (one that is over still writes), two schedulers with
memories that grow old, three requests. After every action the server must reply, and hold, what the
model does, and the model's properties must hold. In the end, when the faults stop, all work ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.queue_driver import QueueDriver
from support.queue_model import ENDED, Action, World
from support.queue_moves import any_moves, next_step
from support.queue_properties import check_memories, check_step, check_world
from support.queue_replay import Replay
from support.queue_search import start
from wire.client import connect

NUM_REQUESTS = 3
MAX_TOKENS = 4
STATES = ["", "done", "failed", "cancelled", "expired", "retry"]


class Queue(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = self.run(self.connect())
        self.replay = Replay(QueueDriver(self.client), start(NUM_REQUESTS))
        self.past: list[Action] = []
        self.run(self.replay.open())
        for request in range(2):
            self.play(Action("submit", (request,)))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def connect(self) -> Any:
        return connect(self.url)

    @property
    def world(self) -> World:
        return self.replay.world

    def play(self, action: Action) -> None:
        before = self.world
        reply = self.run(self.replay.play(action))
        check_step(before, action, reply, self.world)
        self.past.append(action)

    def moves(self, *, faults: bool) -> list[Action]:
        moves = any_moves(self.world, MAX_TOKENS)
        # What is in half a page is for the server to choose, and no two choose alike.
        return [
            action
            for action, is_fault in moves
            if is_fault == faults and not (action.name == "reclaim" and action.args[2])
        ]

    # What happens

    @precondition(lambda self: self.moves(faults=False))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        self.play(data.draw(st.sampled_from(self.moves(faults=False))))

    @precondition(lambda self: self.moves(faults=True))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.play(data.draw(st.sampled_from(self.moves(faults=True))))

    @rule(data=st.data())
    def call_again(self, data: st.DataObject) -> None:
        """The reply was lost, or the call came late."""
        self.play(data.draw(st.sampled_from(self.past)))

    @precondition(lambda self: self.world.notes)
    @rule(data=st.data(), dead=st.booleans(), exclusive=st.booleans(), lost=st.booleans())
    def act_on_notes(self, data: st.DataObject, dead: bool, exclusive: bool, lost: bool) -> None:
        """Send, or reject, what was noted, whether or not it is still so."""
        by, _ = data.draw(st.sampled_from(sorted(note for note, _ in self.world.notes)))
        noted = sorted(request for (who, request), _ in self.world.notes if who == by)
        batch = tuple(data.draw(st.lists(st.sampled_from(noted), min_size=1, unique=True)))
        to = data.draw(st.sampled_from([None, *(life for life, _ in self.world.groups)]))
        if to is None:
            self.play(Action("reject", (by, batch[0], "expired", dead, lost)))
        else:
            self.play(Action("assign", (by, to, batch, exclusive, lost)))

    @precondition(lambda self: any(group.believes for _, group in self.world.groups))
    @rule(data=st.data(), chunk=st.booleans(), state=st.sampled_from(STATES), lost=st.booleans())
    def write(self, data: st.DataObject, chunk: bool, state: str, lost: bool) -> None:
        """Tokens, an end, or both; by any life of a group, of all that it ever held."""
        beliefs = [(life, one) for life, group in self.world.groups for one in group.believes]
        life, belief = data.draw(st.sampled_from(sorted(beliefs)))
        self.play(Action("commit", (life, belief, chunk, state, lost)))

    @rule(data=st.data(), how=st.sampled_from(["lapsed", "crashed", "leaving"]))
    def take_a_full_page(self, data: st.DataObject, how: str) -> None:
        """Whether there is more, the next call will tell; and it may never be made."""
        life, group = data.draw(st.sampled_from([*self.world.groups]))
        self.play(Action("reclaim", (life, how, tuple(sorted(group.owned)) or None)))

    # What must hold

    @invariant()
    def server_and_model_agree_and_nothing_is_lost(self) -> None:
        self.run(self.replay.compare())
        check_world(self.world)
        check_memories(self.world)

    def teardown(self) -> None:
        """When the faults stop, all work ends."""
        try:
            while (action := next_step(self.world)) is not None:
                self.play(action)
            self.run(self.replay.compare())
            check_world(self.world)
            assert all(record.state in ENDED for record in self.world.records)
        finally:
            self.run(self.client.aclose())
            self.runner.close()


@pytest.mark.slow
@pytest.mark.timeout(400)  # a failure is made as small as can be, which takes minutes
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
