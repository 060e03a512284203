"""All worlds that the queue's model can reach with a number of faults, breadth first.

Worlds that differ only in names (which request, group, scheduler) or in what makes no difference
any more have one `signature`, and only the first that is found of them is followed. It is one after
the fewest faults; so what is free is always followed to its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations
from random import Random
from typing import Any, NamedTuple

from support.queue_model import ENDED, MAX_CRASHES, Action, Group, Record, Reply, World, step
from support.queue_moves import IN_VAIN, SCHEDULERS, Move, half, is_current

NUM_LOOKED_AT, NUM_LATE, NUM_GROUNDLESS = 2000, 4, 4
STATES = ("", "queued", "assigned", "delayed")
LEASES = ("new", "held", "over", "dead", "gone")

Moves = Callable[[World], Iterable[Move]]
Check = Callable[[World, Action, Reply, World], None]


class Node(NamedTuple):
    """A world, and how it was first reached."""

    world: World
    num_faults: int = 0
    num_steps: int = 0
    parent: int = -1
    action: Action | None = None


@dataclass
class Graph:
    """Worlds, and for each of them those that it leads to without faults."""

    nodes: list[Node]
    next: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def path(self, index: int) -> list[Action]:
        """What happened before a world."""
        actions = []
        while (action := self.nodes[index].action) is not None:
            actions.append(action)
            index = self.nodes[index].parent
        return actions[::-1]

    @property
    def depth(self) -> int:
        """Steps to the world that is furthest away."""
        return max(node.num_steps for node in self.nodes)

    def sample(self, random: Random, num_paths: int, moves: Moves) -> list[list[Action]]:
        """Paths that end with each kind of action, and effect of it, as often as with any other.

        After that come calls again: late ones, or such as nobody had a reason for.
        """
        kinds: dict[Any, list[tuple[int, Action]]] = defaultdict(list)
        first = range(len(self.nodes))[:NUM_LOOKED_AT]
        for index in [*first, *random.choices(range(len(self.nodes)), k=NUM_LOOKED_AT)]:
            world = self.nodes[index].world
            for action, _ in moves(world):
                kinds[_kind(world, action)].append((index, action))
        per_kind = -(-num_paths // len(kinds))
        chosen = [random.choice(kind) for kind in kinds.values() for _ in range(per_kind)]
        random.shuffle(chosen)
        paths = [[*self.path(index), action] for index, action in chosen]
        return [
            path + _calls_again(self.nodes[index].world, path, random)
            for path, (index, _) in zip(paths, chosen, strict=True)
        ]


def _kind(world: World, action: Action) -> Any:
    after, reply = step(world, action)
    effects = {
        (old.state, old.cancelled, old.num_errors > 0, old.num_crashes > 0, new.state)
        for old, new in zip(world.records, after.records, strict=True)
        if old != new
    }
    how = [arg for arg in action.args if isinstance(arg, str | bool)]
    return action.name, *how, reply if isinstance(reply, str) else "", frozenset(effects)


def _calls_again(world: World, path: list[Action], random: Random) -> list[Action]:
    late = [action for action in path if action.name != "read"]
    writes = [action for action in late if action.name == "commit"]
    requests, lives = range(len(world.records)), [life for life, _ in world.groups]
    groundless = [Action("replay", (letter, random.choice(requests))) for letter in requests]
    groundless += [Action("cancel", (request,)) for request in requests]
    groundless += [Action("reclaim", (life, "lapsed", None)) for life in lives]
    for (by, request), _ in world.notes:
        groundless.append(Action("reject", (by, request, "expired", False, True)))
        groundless.append(Action("assign", (by, random.choice(lives), (request,), False, True)))
    others = random.choices(late, k=NUM_LATE) + random.choices(groundless, k=NUM_GROUNDLESS)
    return writes + others


def start(num_requests: int, num_groups: int = 2) -> World:
    """Nothing submitted, all groups alive."""
    groups = tuple(((group, 1), Group("held", joined=True)) for group in range(num_groups))
    return World((Record(),) * num_requests, groups)


def explore(world: World, *, max_faults: int, moves: Moves, check: Check) -> Graph:
    """Follow all moves; `check` sees every one that changes something."""
    graph = Graph([Node(world)])
    found = {signature(world): 0}
    here = [0]
    for num_faults in range(max_faults + 1):
        faulty: list[tuple[int, Node]] = []
        for index in here:  # which grows on the way
            world, num_steps = graph.nodes[index].world, graph.nodes[index].num_steps + 1
            for action, is_fault in moves(world):
                if is_fault and num_faults == max_faults:
                    continue
                after, reply = step(world, action)
                if after == world:
                    continue
                check(world, action, reply, after)
                key = signature(after)
                if is_fault:
                    if key not in found:
                        faulty.append((key, Node(after, num_faults + 1, num_steps, index, action)))
                    continue
                if key not in found:
                    found[key] = len(graph.nodes)
                    here.append(len(graph.nodes))
                    graph.nodes.append(Node(after, num_faults, num_steps, index, action))
                if reply != IN_VAIN and found[key] != index:
                    graph.next[index].add(found[key])
        here = []
        for key, node in faulty:
            if key not in found:
                found[key] = len(graph.nodes)
                here.append(len(graph.nodes))
                graph.nodes.append(node)
    return graph


def signature(world: World) -> int:
    """The same for worlds that differ only in names or in what makes no difference."""
    notes, delayed = world.notes, dict(world.delayed)
    facts: list[tuple[int, ...]] = []
    noted: list[list[bool]] = []
    for request, record in enumerate(world.records):
        state, fence = record.state, record.fence
        # A note under another fence than the record's is as good as none, and so is a belief.
        is_queued = state == "queued"
        noted.append([is_queued and ((who, request), fence) in notes for who in SCHEDULERS])
        if state in ENDED:
            facts.append((-1, request in world.letters))
            continue
        facts.append(
            (
                STATES.index(state),
                request in world.letters,
                sum(noted[-1]),
                min(record.num_crashes, MAX_CRASHES),
                half(record),
                record.num_errors,
                record.num_journaled,
                record.cancelled,
                record.error,
                delayed.get(request, -1),
            )
        )
    in_order = sorted(facts)
    orders = [
        order
        for order in permutations(range(len(facts)))
        if [facts[request] for request in order] == in_order
    ]
    return hash((tuple(in_order), min([_links(world, order, noted) for order in orders])))


def _links(world: World, order: tuple[int, ...], noted: list[list[bool]]) -> tuple[Any, ...]:
    """Who has which requests, these being named by their places in `order`."""
    latest = {name: epoch for (name, epoch), _ in world.groups}
    groups: dict[int, list[tuple[Any, ...]]] = {name: [] for name in latest}
    for (name, epoch), group in world.groups:
        is_latest = latest[name] == epoch
        if not (is_latest or group.owned or group.lease in ("held", "over")):
            continue
        held = [(order.index(b.request), b.offset) for b in group.believes if is_current(world, b)]
        groups[name].append(
            (
                is_latest,
                LEASES.index(group.lease),
                group.alone if group.owned or group.alone == "wanted" else "",
                group.num_held if group.lease == "dead" else 0,
                tuple([request in group.owned for request in order]),
                tuple(sorted(held)),
            )
        )
    schedulers = sorted([tuple([noted[request][who] for request in order]) for who in SCHEDULERS])
    return tuple(schedulers), tuple(sorted([tuple(sorted(lives)) for lives in groups.values()]))
