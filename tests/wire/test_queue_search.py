"""Every world that the queue can get into with a few faults: two of everything, breadth first.

Two requests, two groups, two schedulers; and three faults, of any kind and at any time: leases that
end, restarts, zombies' heartbeats, ranks that die, orderly leaves, errors, lost replies, lost
memories, cancellations, rejections; halfway through a reclaim, too. What is promised of each of
these worlds is in `support.queue_properties`; here, that they all keep it, and that work ends when
the faults do. `test_queue_replay` takes some of the same ways on a real server.
"""

from __future__ import annotations

import inspect
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support import queue_model
from support.queue_model import ENDED, Action, Reply, World
from support.queue_moves import poisoned_moves, prompt_moves
from support.queue_properties import check_memories, check_step, check_world
from support.queue_search import Graph, explore, start

MAX_FAULTS = 3

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return explore(start(2), max_faults=MAX_FAULTS, moves=prompt_moves, check=check_step)


def num_steps_to_the_end(graph: Graph) -> int:
    """At most, whatever is done first. Raises CycleError if work can go round in circles."""
    longest: dict[int, int] = {}
    for index in TopologicalSorter(graph.next).static_order():
        longest[index] = max((1 + longest[after] for after in graph.next[index]), default=0)
    return max(longest.values())


def ends(graph: Graph) -> list[World]:
    """The worlds in which nothing more happens without a fault."""
    return [node.world for index, node in enumerate(graph.nodes) if not graph.next[index]]


@pytest.mark.slow
def test_no_request_is_lost_and_none_ends_twice(graph: Graph) -> None:
    for node in graph.nodes:
        check_world(node.world)
        check_memories(node.world)
    print(f"{len(graph.nodes)} worlds, up to {graph.depth} steps away")
    assert len(graph.nodes) > 50_000, "the search has become blind"


@pytest.mark.slow
def test_when_the_faults_stop_all_work_ends(graph: Graph) -> None:
    print(f"from any world within {num_steps_to_the_end(graph)} steps, in any order")
    assert all(record.state in ENDED for world in ends(graph) for record in world.records)


def test_a_request_that_kills_its_groups_is_given_up_and_its_neighbours_are_not() -> None:
    graph = explore(start(3), max_faults=0, moves=poisoned_moves, check=check_step)
    num_steps_to_the_end(graph)
    assert {world.letters for world in ends(graph)} == {frozenset({0})}
    for world in ends(graph):
        assert [record.state for record in world.records] == ["failed", "done", "done"]


# What each of these guards of the model prevents is found where it is missing.

GUARDS = {
    "a fence": ("and self._records[request].fence == fence", ""),
    "a state": ("self._records[request].state == state and", ""),
    "a dead group stays in sight": ('lease="dead", num_held', 'lease="gone", num_held'),
    "what is sent leaves the intake": ("self._intake -= {(request, fence)}", "pass"),
    "what ends waits no more": ("self._delayed -= {(request, True), (request, False)}", "pass"),
    "what ends is not held": ("owned=self._groups[life].owned - {request}", ""),
    "a wish outlives the group": ("if record.cancelled:", "if False:"),
}
GUARDS_OF_NEIGHBOURS = {
    "suspects are alone": ("if (reserved and not exclusive)", "if False"),
    "a suspect takes no place": ("if exclusive and group.owned:", "if False:"),
    "crowds are not to blame": ("if num_crashed == 1 and", "if num_crashed and"),
}


@pytest.mark.parametrize("guard", [*GUARDS, *GUARDS_OF_NEIGHBOURS])
def test_no_guard_can_be_missing(
    guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it, without_it = (GUARDS | GUARDS_OF_NEIGHBOURS)[guard]
    source = inspect.getsource(queue_model)
    assert source.count(with_it) == 1
    (tmp_path / "unguarded.py").write_text(source.replace(with_it, without_it))
    unguarded = runpy.run_path(str(tmp_path / "unguarded.py"))
    monkeypatch.setattr(queue_model, "Moment", unguarded["Moment"])

    def check(before: World, action: Action, reply: Reply, after: World) -> None:
        check_step(before, action, reply, after)
        check_world(after)
        check_memories(after)

    is_of_neighbours = guard in GUARDS_OF_NEIGHBOURS
    num_requests, max_faults = (3, 0) if is_of_neighbours else (2, 2)
    moves = poisoned_moves if is_of_neighbours else prompt_moves
    with pytest.raises(AssertionError):
        explore(start(num_requests), max_faults=max_faults, moves=moves, check=check)
