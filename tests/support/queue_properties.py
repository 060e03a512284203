"""What must hold in every world of the queue, and of every step from one to the next.

Safety: no request has two results, none is lost, each is at one place or in one group's hands, and
whoever acts upon something that is over changes nothing. And nothing starves: whoever finds a
queued request and an idle group can bring the two together.
"""

from __future__ import annotations

from support.queue_model import (
    CREDITS,
    ENDED,
    MAX_CRASHES,
    MAX_ERRORS,
    Action,
    Belief,
    Record,
    Reply,
    World,
    step,
)


def check_world(world: World) -> None:
    """No request is lost or has two results, and no group has what is not its own."""
    for request, record in enumerate(world.records):
        results = [state for id_, state in world.results if id_ == request]
        assert results == ([record.state] if record.state in ENDED else []), "one when it ends"
        # What goes on is at one place, where somebody will look for it.
        entries = [fence for id_, fence in world.intake if id_ == request]
        assert entries == ([record.fence] if record.state == "queued" else [])
        num_delays = sum(id_ == request for id_, _ in world.delayed)
        assert num_delays == (record.state == "delayed")
        owners = [life for life, group in world.groups if request in group.owned]
        assert owners == ([record.owner] if record.state == "assigned" else [])
        assert not record.cancelled or record.state == "assigned", "the wish was put off"
        assert record.state == "failed" or request not in world.letters
    for life, group in world.groups:
        assert len(group.owned) <= CREDITS
        assert group.lease in ("held", "over", "dead") or not group.owned, "nobody takes it back"
        for belief in group.believes:
            record = world.records[belief.request]
            is_right = record.state == "assigned" and record.fence == belief.fence
            assert not is_right or record.owner == life, "two groups may write"


def check_step(before: World, action: Action, reply: Reply, after: World) -> None:
    """Ends are final, fences and journals only grow, and a group writes what it holds."""
    for request, (old, new) in enumerate(zip(before.records, after.records, strict=True)):
        if old is new:
            continue
        assert old.state not in ENDED, "an end is final"
        assert new.fence >= old.fence
        assert new.fence > old.fence or new.state != "assigned" or old.state == "assigned"
        assert new.num_journaled >= old.num_journaled
        assert not old.cancelled or new.state in ("assigned", *ENDED), "it would run again"
        if request in after.letters and action.name != "reject":
            assert _is_to_blame(new), "it failed for what another one may have done"
    if action.name == "commit":
        life, belief = action.args[:2]
        is_owner = before.records[belief.request].owner == life
        assert is_owner if reply == () else after.records == before.records
    if action.name == "assign" and isinstance(reply, tuple) and reply:
        _, life, _, exclusive, _ = action.args
        group = dict(before.groups)[life]
        assert not group.owned or not (exclusive or group.alone), "one of them was to be alone"


def check_memories(world: World) -> None:
    """To act upon what is over changes nothing; to look again, and then to act, helps."""
    alive = [life for life, group in world.groups if group.lease == "held"]
    for request, record in enumerate(world.records):
        fence = record.fence - (record.state == "assigned")  # of what its last holder had before
        belief = Belief(request, fence, record.num_journaled)
        life = record.owner or world.groups[0][0]
        write = Action("commit", (life, belief, True, "done", True))
        assert step(world, write) == (world, (request,)), "it writes what it has not"
        fence = record.fence - (record.state == "queued")
        confused = world._replace(notes=frozenset([((0, request), fence)]))
        sendings = [Action("assign", (0, life, (request,), False, True)) for life in alive[:1]]
        for act in (Action("reject", (0, request, "failed", True, True)), *sendings):
            after, reply = step(confused, act)
            assert after == confused, "it sends, or ends, what another has"
            assert reply in (0, (), "full")
        if record.state == "queued":
            noted, _ = step(world, Action("read", (0, request)))
            for life in alive:
                group = dict(world.groups)[life]
                if not group.owned and group.alone != "wanted":
                    send = Action("assign", (0, life, (request,), False, False))
                    assert step(noted, send)[1] == (request,), "it starves"


def _is_to_blame(record: Record) -> bool:
    had_errors = record.num_errors >= MAX_ERRORS
    return had_errors or (record.num_crashes >= MAX_CRASHES and record.num_neighbours == 0)
