"""The queue's state machine as a specification: what each script does, in each state.

                     assign (fence up)
    submit ──▶ queued ────────────────────────▶ assigned ──commit──▶ done failed cancelled expired
    replay      │ ▲ ▲   reclaim, reconcile       │   │
                │ │ └──────── (fence up) ────────┘   │ commit "retry" (fence up)
                │ │        or ──▶ cancelled failed   ▼
                │ └────────────── retry ────────── delayed
                └─ cancel, reject ──▶ cancelled failed expired (each with one result)

What fails in the queue is a dead letter: by errors, by crashes of which it met the last one alone,
or by a scheduler's word. `replay` makes a new request of it. One life of a group:

    new ──beat─▶ held ◀─beat─ over ──reclaim─▶ dead (declared, not drained) ──reclaim─▶ gone
                  └─ end_lease ─▲    (or, if it says so itself, from held)

A world is a value; `step` gives the next one, and the reply. It holds what the server has, and what
the actors remember of it: schedulers have notes, groups beliefs, however old. So a group whose life
is over still writes. With `lost`, the reply does not reach its actor, who can only call again. Time
is abstract: that a lease ends is an action. Requests, schedulers and groups are numbers; a life is
a group's number and its epoch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Life = tuple[int, int]
Batch = tuple[int, ...]
Reply = str | int | tuple[int, ...] | None

MAX_CRASHES, MAX_ERRORS, CREDITS, CHUNK_TOKENS = 2, 2, 2, 2
ENDED = frozenset({"done", "failed", "cancelled", "expired"})


class Record(NamedTuple):
    """A request. Its entry in the intake is named by the fence under which it was queued."""

    state: str = ""  # not submitted
    fence: int = 0
    owner: Life | None = None
    num_crashes: int = 0
    num_errors: int = 0
    num_neighbours: int = 0
    num_journaled: int = 0
    cancelled: bool = False
    error: bool = False  # of its last attempt, yet to be judged
    by_group: bool = False  # ended by the group that had it


class Belief(NamedTuple):
    """What a group thinks that it holds, under which fence, and where its next chunk begins."""

    request: int
    fence: int
    offset: int


class Group(NamedTuple):
    """One life of a group: what the server has of it, and what its process remembers."""

    lease: str = "new"
    owned: frozenset[int] = frozenset()
    alone: str = ""  # or 'wanted', 'running'
    num_held: int = 0  # when it was declared dead
    joined: bool = False  # has had a reply to a beat
    believes: frozenset[Belief] = frozenset()


class World(NamedTuple):
    records: tuple[Record, ...]
    groups: tuple[tuple[Life, Group], ...] = ()
    notes: frozenset[tuple[tuple[int, int], int]] = frozenset()  # (scheduler, request), fence
    intake: frozenset[tuple[int, int]] = frozenset()  # request, fence
    delayed: frozenset[tuple[int, bool]] = frozenset()  # request, whether it is due
    letters: frozenset[int] = frozenset()
    results: tuple[tuple[int, str], ...] = ()


class Action(NamedTuple):
    """One of the public methods of `Moment`, and its arguments."""

    name: str
    args: tuple[Any, ...]


def step(world: World, action: Action) -> tuple[World, Reply]:
    """The world after an action, and the reply to it. Every action is possible in every world."""
    now = Moment(world)
    reply: Reply = getattr(now, action.name)(*action.args)
    return now.world(), reply


class Moment:
    """A world while an action changes it."""

    def __init__(self, world: World) -> None:
        self._records, self._groups = list(world.records), dict(world.groups)
        self._notes, self._intake, self._delayed = dict(world.notes), world.intake, world.delayed
        self._letters, self._results = world.letters, world.results

    def world(self) -> World:
        records, groups = tuple(self._records), tuple(self._groups.items())
        sets = frozenset(self._notes.items()), self._intake, self._delayed, self._letters
        return World(records, groups, *sets, self._results)

    # Producers

    def submit(self, request: int) -> Reply:
        if self._records[request].state:
            return "known"
        self._enqueue(request)
        return "new"

    def cancel(self, request: int) -> Reply:
        record = self._records[request]
        if record.owner is not None:
            self._set(request, cancelled=True)
            return "requested"
        if record.state in ("queued", "delayed"):
            self._finish(request, "cancelled")
        return self._records[request].state or "unknown"

    def replay(self, letter: int, new: int) -> Reply:
        if letter not in self._letters:
            return "gone"
        outcome = self.submit(new)
        self._letters -= {letter} if outcome == "new" else set()
        return outcome

    # Schedulers

    def read(self, by: int, request: int) -> None:
        if self._records[request].state == "queued":
            self._notes[by, request] = self._records[request].fence

    def assign(self, by: int, life: Life, batch: Batch, exclusive: bool, lost: bool) -> Reply:
        group = self._groups[life]
        if group.lease != "held":
            return "gone"
        if exclusive and group.owned:
            self._change(life, alone=group.alone or "wanted")
            return "full"
        reserved = group.alone == "wanted" or (group.alone == "running" and group.owned)
        if (reserved and not exclusive) or len(group.owned) + len(batch) > CREDITS:
            return "full"
        assigned, believes = [], group.believes
        for request in batch:
            fence = self._notes.get((by, request), -1)
            if self._is("queued", request, fence):
                self._intake -= {(request, fence)}
                self._set(request, state="assigned", owner=life, fence=fence + 1)
                assigned.append(request)
                # Mail that comes late is no different from a group that acts late upon it.
                believes |= {Belief(request, fence + 1, self._records[request].num_journaled)}
            if not lost:
                self._notes.pop((by, request), None)
        if assigned:
            alone, owned = "running" if exclusive else "", group.owned.union(assigned)
            self._change(life, owned=owned, alone=alone, believes=believes)
        return tuple(assigned)

    def reject(self, by: int, request: int, state: str, dead: bool, lost: bool) -> Reply:
        is_queued = self._is("queued", request, self._notes.get((by, request), -1))
        if is_queued:
            self._finish(request, "failed" if dead else state, dead=dead)
        if not lost:
            self._notes.pop((by, request), None)
        return int(is_queued)

    def retry(self) -> Reply:
        num_queued = num_failed = 0
        for request in sorted(request for request, is_due in self._delayed if is_due):
            if not self._records[request].error:
                self._enqueue(request)
                num_queued += 1
            elif self._records[request].num_errors >= MAX_ERRORS:
                self._finish(request, "failed", dead=True)
                num_failed += 1
            else:
                self._set(request, error=False)
                self._delayed = self._delayed - {(request, True)} | {(request, False)}
        return num_queued, num_failed

    def reclaim(self, life: Life, how: str, page: Batch | None) -> Reply:
        """Take a page that is full or (None) all that there is."""
        group = self._groups[life]
        if how == "lapsed" and group.lease == "held":
            return None
        if group.lease != "dead":
            group = group._replace(lease="dead", num_held=len(group.owned))
        num_crashed = 0 if how == "leaving" else group.num_held
        taken = sorted(group.owned if page is None else group.owned.intersection(page))
        became = [self._put_back(request, num_crashed) for request in taken]
        self._groups[life] = group._replace(owned=group.owned.difference(taken))
        if page is None:
            self._change(life, lease="gone", alone="")
        return len(taken), became.count("failed")

    # Groups

    def register(self, group: int) -> None:
        epoch = 1 + max((epoch for name, epoch in self._groups if name == group), default=0)
        self._groups[group, epoch] = Group()

    def beat(self, life: Life, lost: bool) -> Reply:
        group = self._groups[life]
        if group.lease == "dead" or (group.lease in ("new", "gone") and group.joined):
            return False
        self._change(life, lease="held", joined=group.joined or not lost)
        return True

    def commit(self, life: Life, belief: Belief, chunk: bool, state: str, lost: bool) -> Reply:
        (request, fence, offset), record = belief, self._records[belief.request]
        end, is_current = offset + CHUNK_TOKENS * chunk, self._is("assigned", request, fence)
        if not lost:
            going_on = {belief._replace(offset=end)} if is_current and not state else set()
            self._change(life, believes=self._groups[life].believes - {belief} | going_on)
        if not is_current:
            return (request,)
        if record.num_journaled == offset:
            self._set(request, num_journaled=end)
        if state:
            self._change(life, owned=self._groups[life].owned - {request})
        if state == "retry" and not record.cancelled:
            self._set(request, state="delayed", owner=None, fence=fence + 1, error=True)
            self._set(request, num_errors=record.num_errors + 1)
            self._delayed |= {(request, True)}
        elif state:
            self._finish(request, "cancelled" if state == "retry" else state, state != "retry")
        return ()

    def reconcile(self, life: Life) -> Reply:
        """Say what it knows of, and learn where the journals end."""
        group, records = self._groups[life], self._records
        held = frozenset(each for each in group.believes if self._is("assigned", *each[:2]))
        known = {each._replace(offset=records[each.request].num_journaled) for each in held}
        unknown = sorted(group.owned - {each.request for each in known})
        believes = (group.believes - held).union(known)
        self._change(life, owned=group.owned.difference(unknown), believes=believes)
        became = [self._put_back(request) for request in unknown]
        return became.count("queued"), *(each.offset for each in sorted(known))

    # What nobody calls for

    def end_lease(self, life: Life) -> None:
        if self._groups[life].lease == "held":
            self._change(life, lease="over")

    def end_delay(self, request: int) -> None:
        self._delayed = frozenset((id_, due or id_ == request) for id_, due in self._delayed)

    def end_reservation(self, life: Life) -> None:
        if self._groups[life].alone == "wanted":
            self._change(life, alone="")

    def forget(self, life: Life, belief: Belief) -> None:
        """The group was done with it, but the server has lost what it was told."""
        self._change(life, believes=self._groups[life].believes - {belief})

    # What the scripts share

    def _set(self, request: int, **fields: Any) -> None:
        self._records[request] = self._records[request]._replace(**fields)

    def _change(self, life: Life, **fields: Any) -> None:
        self._groups[life] = self._groups[life]._replace(**fields)

    def _is(self, state: str, request: int, fence: int) -> bool:
        """The guard of all that an actor does upon what it remembers."""
        return self._records[request].state == state and self._records[request].fence == fence

    def _enqueue(self, request: int) -> None:
        self._set(request, state="queued", owner=None)
        self._intake |= {(request, self._records[request].fence)}
        self._delayed -= {(request, True)}

    def _finish(self, request: int, state: str, by_group: bool = False, dead: bool = False) -> None:
        self._intake -= {(request, self._records[request].fence)}
        self._delayed -= {(request, True), (request, False)}
        self._set(request, state=state, owner=None, cancelled=False, error=False, by_group=by_group)
        self._results += ((request, state),)
        self._letters |= {request} if dead else set()

    def _put_back(self, request: int, num_crashed: int = 0) -> str:
        """Queue a request that its group serves no more, or end it; say what became of it."""
        record = self._records[request]
        self._set(request, fence=record.fence + 1)
        if record.cancelled:
            self._finish(request, "cancelled")
            return "cancelled"
        if num_crashed:
            num_crashes, num_neighbours = record.num_crashes + 1, num_crashed - 1
            self._set(request, num_crashes=num_crashes, num_neighbours=num_neighbours)
        if num_crashed == 1 and num_crashes >= MAX_CRASHES:
            self._finish(request, "failed", dead=True)
        else:
            self._enqueue(request)
        return self._records[request].state
