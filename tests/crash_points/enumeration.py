"""Which crash points there are: recorded, not guessed.

    every_point       each call that the processes of an undisturbed job make, struck in each way
    every_recovery    each call of what follows from a crash: of the next life of whoever died, and
                      those of the others that an undisturbed job does not need
    combinations      two replies in a row lost; two processes dead at once

A call is known by its process, its kind and its number among those of its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from crash_points.points import ROLES, Point, Scenario
from crash_points.running import Outcome
from support.fault_injection import STRIKES

ACK = "MULTI + XACK results + XDEL results + EXEC"
CRASHES = tuple(
    Point.parse(text)
    for text in (
        "producer / EVALSHA submit / 10 / kill_after",
        "scheduler / EVALSHA assign / 1 / kill_before",
        "worker / EVALSHA commit / 6 / kill_before",
        f"consumer / {ACK} / 5 / kill_before",
        "reader / XREAD bell / 8 / kill_after",
    )
)
"""The crashes whose recoveries are enumerated: in the middle of the job, with much in flight."""


def every_point(recordings: Sequence[Outcome]) -> list[Scenario]:
    """All calls of all processes, in all ways."""
    return [
        Scenario((Point(role, kind, nth, strike),))
        for role in ROLES
        for kind, num_calls in sorted(_usual_calls(recordings, role, life=1).items())
        for nth in range(1, num_calls + 1)
        for strike in STRIKES
    ]


def every_recovery(
    crash: Point, undisturbed: Sequence[Outcome], recordings: Sequence[Outcome]
) -> list[Scenario]:
    """The calls after a crash, as `recordings` have them that came so far; each in one way.

    Which way, takes turns; but the first call of a kind that an undisturbed job does not have is
    struck in all three.
    """
    crashed = [o for o in recordings if o.scenario == str(crash) and not o.num_unreached]
    assert crashed, f"no recording came as far as {crash}"
    turns = count()
    scenarios = []
    for role in ROLES:
        usual = _usual_calls(undisturbed, role, life=1)
        after = _usual_calls(crashed, role, life=2 if role == crash.role else 1)
        for kind, num_calls in sorted(after.items()):
            if kind in usual and role != crash.role:
                continue
            for nth in range(1, num_calls + 1):
                is_first = nth == 1 and kind not in usual
                strikes = STRIKES if is_first else [STRIKES[next(turns) % len(STRIKES)]]
                scenarios += [Scenario((crash, Point(role, kind, nth, s))) for s in strikes]
    return scenarios


def combinations(recordings: Sequence[Outcome]) -> Iterator[Scenario]:
    """Two replies lost in a row, at every third call; a worker dying with each of the others."""
    turns = count()
    for role in ROLES:
        for kind, num_calls in sorted(_usual_calls(recordings, role, life=1).items()):
            for nth in range(1, num_calls + 1):
                turn = next(turns)
                if turn % 3 == 0:
                    yield Scenario((Point(role, kind, nth, "drop_reply", times=2),))
                elif turn % 6 == 1:
                    other = "scheduler" if role == "worker" else "worker"
                    strike = STRIKES[turn // 6 % 2]
                    yield Scenario((Point(role, kind, nth, strike, together=(other,)),))


def table(scenarios: Sequence[Scenario]) -> str:
    """How many points there are for each role and kind of call; of recoveries, the last point's."""
    rows = Counter((s.points[-1].role, s.points[-1].kind) for s in scenarios)
    lines = [
        f"{role:<9}  {kind:<44}  {rows[role, kind]:>5}"
        for role in ROLES
        for kind in sorted(kind for role_of, kind in rows if role_of == role)
    ]
    return "\n".join([*lines, f"{'all':<55}  {len(scenarios):>5}"])


def _usual_calls(recordings: Sequence[Outcome], role: str, *, life: int) -> Mapping[str, int]:
    """How many calls of each kind a role makes in one of its lives, in seven of eight runs or more.

    Some calls depend on the moment: a read finds more at a time when much runs at once, and what is
    done by the clock is done more often then.
    """
    calls = [outcome.num_calls[role][life - 1] for outcome in recordings]
    kinds = {kind for of_run in calls for kind in of_run}
    usual = {
        kind: sorted(of_run.get(kind, 0) for of_run in calls)[len(calls) // 8] for kind in kinds
    }
    return {kind: num_calls for kind, num_calls in usual.items() if num_calls}
