"""How soon to look at the fleet again. Pure: it is told what was seen, and says how long to wait.

Looking costs a round trip, so a scheduler that has nothing to send looks just often enough to
declare the dead in time. One that waits for room looks as often as room comes: groups hold as many
requests in waiting as they run, so it is enough to look before they have run out of them.

    nothing waits               IDLE_S
    no group is there           JOINING_S
    requests wait for room      halved while ROOM_SHARE of the credits, or more, has become free
                                since the last look, else doubled; BUSY_S to SLOW_S
"""

from __future__ import annotations

from scheduler.policy.fleet_view import FleetView

IDLE_S = 0.25
JOINING_S = 0.05
BUSY_S = 0.02
SLOW_S = 0.1
ROOM_SHARE = 1 / 8


class Looking:
    """The pace of one scheduler's looks."""

    def __init__(self) -> None:
        self._busy_s = BUSY_S

    def next_s(self, *, num_waiting: int, fleet: FleetView) -> float:
        """How long to wait, in seconds, after a look that has shown this `fleet`."""
        if not num_waiting:
            self._busy_s = BUSY_S
            return IDLE_S
        if not fleet.groups:
            return JOINING_S
        num_credits = sum(group.status.credits for group in fleet.groups.values())
        is_short = fleet.room >= ROOM_SHARE * num_credits
        self._busy_s = max(BUSY_S, self._busy_s / 2) if is_short else min(SLOW_S, 2 * self._busy_s)
        return self._busy_s
