"""Finding out which request crashes its group, without taking its neighbours along.

A request whose group has crashed once was probably just there. From the second time on it is a
suspect: it is served in a batch that has a group for itself, of at most half as many requests as
held that group before. So each further crash halves the number of those that may have caused it,
until the culprit is alone, and fails alone (reclaim.lua); all others get their answers.
"""

from __future__ import annotations

from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.planning import BatchLimits, PlannedBatch

SUSPECT_AFTER_CRASHES = 2


def is_suspect(request: ReadyRequest) -> bool:
    """Whether a request may go out only in an exclusive batch."""
    return request.num_crashes >= SUSPECT_AFTER_CRASHES


def plan_suspects(
    suspects: PendingRequests, fleet: FleetView, limits: BatchLimits, *, ask_again: bool = False
) -> PlannedBatch | None:
    """Take out the next exclusive batch, for the group that is empty soonest.

    A group that holds requests may be named too: asking for it has it emptied. None while it is
    being emptied, unless it is time to `ask_again`, so that nobody else fills it.
    """
    candidates = [group for group in fleet.groups.values() if _may_serve(group)]
    if not suspects or not candidates:
        return None
    group = min(candidates, key=lambda group: (group.num_owned, not group.exclusive, group.key))
    if group.num_owned and group.exclusive and not ask_again:
        return None
    batch, left_over = PlannedBatch(group, exclusive=True), list[ReadyRequest]()
    at_most = group.status.credits
    for request in suspects.take(len(suspects)):
        half = max(1, (request.num_neighbours + 1) // 2)
        fits = len(batch.requests) < min(at_most, half) and batch.takes(request, limits)
        if not fits:
            left_over.append(request)
            continue
        at_most = min(at_most, half)
        batch.requests.append(request)
        batch.num_tokens += request.num_prefill_tokens
    suspects.give_back(left_over)
    return batch


def _may_serve(group: GroupView) -> bool:
    return group.status.state == "healthy" and not group.late
