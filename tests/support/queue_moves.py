"""What can happen in a world of the queue's model: freely, or as a fault.

Left out is what cannot change the server's data (calls upon memories that are out of date, calls
again after lost replies): `queue_properties` makes such calls in every world.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from support.queue_model import (
    ENDED,
    MAX_CRASHES,
    Action,
    Batch,
    Belief,
    Group,
    Life,
    Record,
    World,
    step,
)

SCHEDULERS = (0, 1)
SUSPECT_AFTER_CRASHES = MAX_CRASHES
IN_VAIN = "full"
"""The reply to what changes nothing for the better, though it may reserve a group."""


class Move(NamedTuple):
    """Something that can happen."""

    action: Action
    is_fault: bool = False


def any_moves(world: World, max_tokens: int = 1) -> Iterator[Move]:
    """What can happen to a fleet, with every fault there is."""
    for request, record in enumerate(world.records):
        if not record.state:
            yield Move(Action("submit", (request,)))
            for letter in world.letters:
                yield Move(Action("replay", (letter, request)))
        elif record.state not in ENDED and not record.cancelled:
            yield Move(Action("cancel", (request,)), is_fault=True)
    if any(is_due for _, is_due in world.delayed):
        yield Move(Action("retry", ()))
    for request, is_due in world.delayed:
        if not is_due:
            yield Move(Action("end_delay", (request,)))
    for scheduler in SCHEDULERS:
        yield from _moves_of_scheduler(world, scheduler)
    latest = {name: epoch for (name, epoch), _ in world.groups}
    for life, group in world.groups:
        yield from _moves_of_life(life, group, is_latest=life in latest.items())
        for belief in group.believes:
            if is_current(world, belief):
                yield from _moves_of_holder(life, belief, max_tokens)
        if group.owned - {belief.request for belief in group.believes if is_current(world, belief)}:
            yield Move(Action("reconcile", (life,)))


def prompt_moves(world: World) -> Iterator[Move]:
    """Any; but that a group takes its time before its first heartbeat makes no difference."""
    new = [life for life, group in world.groups if group.lease == "new"]
    if new:
        yield Move(Action("beat", (new[0], False)))
    else:
        yield from any_moves(world)


def poisoned_moves(world: World) -> Iterator[Move]:
    """Request 0 kills, sooner or later, every group that computes it; all else goes well."""
    for action, is_fault in prompt_moves(world):
        if action.name == "reclaim" and action.args[1] == "crashed":
            yield Move(action, is_fault=0 not in dict(world.groups)[action.args[0]].owned)
        elif action.name == "commit" and action.args[1].request == 0:
            continue
        elif action.name != "replay":
            yield Move(action, is_fault)


def next_step(world: World) -> Action | None:
    """What gets the work done when nothing fails; None when there is nothing left to do."""
    for action, is_fault in any_moves(world):
        if not is_fault:
            after, reply = step(world, action)
            if after != world and reply != IN_VAIN:
                return action
    return None


def _moves_of_scheduler(world: World, scheduler: int) -> Iterator[Move]:
    current = []
    for request, record in enumerate(world.records):
        if record.state == "queued" and ((scheduler, request), record.fence) in world.notes:
            current.append(request)
            for dead in (False, True):
                args = (scheduler, request, "expired", dead, False)
                yield Move(Action("reject", args), is_fault=True)
        elif record.state == "queued":
            yield Move(Action("read", (scheduler, request)))
    for batch, exclusive in _batches(world, current):
        for life, group in world.groups:
            if group.lease == "held":
                yield Move(Action("assign", (scheduler, life, batch, exclusive, False)))


def _batches(world: World, requests: list[int]) -> Iterator[tuple[Batch, bool]]:
    """What schedulers send together, and whether their group is to have nothing else.

    So are sent those whose groups have crashed again and again, and with no more than half of
    those beside whom they did.
    """
    for size in range(1, len(requests) + 1):
        for batch in combinations(requests, size):
            records = [world.records[request] for request in batch]
            suspects = [each for each in records if each.num_crashes >= SUSPECT_AFTER_CRASHES]
            if size <= min(map(half, suspects), default=size):
                yield batch, bool(suspects)


def half(record: Record) -> int:
    """How many suspects may be together in the next batch, for all that is known of this one."""
    return max(1, (record.num_neighbours + 1) // 2)


def _moves_of_life(life: Life, group: Group, *, is_latest: bool) -> Iterator[Move]:
    if is_latest and group.lease != "new":
        yield Move(Action("register", (life[0],)), is_fault=group.lease != "gone")
    if group.lease == "held":
        yield Move(Action("end_lease", (life,)), is_fault=is_latest)
    elif group.lease in ("new", "over"):  # a late one of an earlier life: a zombie
        yield Move(Action("beat", (life, False)), is_fault=not is_latest)
    if group.alone == "wanted":
        yield Move(Action("end_reservation", (life,)))
    pages = [None, *((request,) for request in group.owned if len(group.owned) > 1)]
    for page in pages:
        if group.lease in ("over", "dead"):
            yield Move(Action("reclaim", (life, "lapsed", page)))
        if group.lease == "held":
            yield Move(Action("reclaim", (life, "crashed", page)), is_fault=True)
        if group.lease in ("held", "over", "dead"):
            yield Move(Action("reclaim", (life, "leaving", page)), is_fault=True)


def _moves_of_holder(life: Life, belief: Belief, max_tokens: int) -> Iterator[Move]:
    if belief.offset < max_tokens:
        yield Move(Action("commit", (life, belief, True, "", False)))
        yield Move(Action("commit", (life, belief, True, "", True)), is_fault=True)
    yield Move(Action("commit", (life, belief, False, "done", False)))
    yield Move(Action("commit", (life, belief, False, "retry", False)), is_fault=True)
    yield Move(Action("forget", (life, belief)), is_fault=True)


def is_current(world: World, belief: Belief) -> bool:
    """Whether a group really holds what it thinks that it holds."""
    record = world.records[belief.request]
    return record.state == "assigned" and record.fence == belief.fence
