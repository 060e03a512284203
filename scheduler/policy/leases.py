"""Which groups are dead, and which may be: what a scheduler makes of the leases that it sees.

A group's lease is over when the server's clock has passed it: its beats stopped. But beats also
stop, for all groups at once, when the server is away. So nobody is declared dead on the strength
of a time in which the scheduler itself saw nothing:

    looks         x  x  x  x              x  x  x  x  x  x  x  x  x  x  x
    sight         clear -----|    gap     |   one lease's time   | clear again
    declares      yes                     nobody                 yes

There was a gap if two looks lie further apart than `gap_s`, on the scheduler's clock (it was
paused, or the server hung) or on the server's (which slept, or was set); if a look failed in
between; or if a lease ends earlier than it did when last seen, since the server has then lost
what was last written. The first look ever ends a gap.

While every look takes longer than `gap_s` nobody is declared: a server that slow holds up beats
just as well. A death that comes after a gap is declared no later than any other, as a group that
beat after the gap has a lease that outlasts the time of grace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GAP_S = 1.0
"""Well below what a group has left after its beat was due: a shorter absence ends no lease."""

SUSPECT_BELOW = 0.4
"""Groups beat before so little of their lease is left: one that has less has missed a beat."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keys of groups: those to declare dead, and those, the dead among them, to send nothing."""

    dead: frozenset[str]
    suspects: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Lease:
    """A group's lease: how much of it is left, and the most that was ever seen to be."""

    until_ms: int
    left_ms: int
    longest_ms: int

    @property
    def is_over(self) -> bool:
        return self.left_ms <= 0

    @property
    def is_short(self) -> bool:
        return self.is_over or self.left_ms < SUSPECT_BELOW * self.longest_ms


class LeaseWatch:
    """One scheduler's judgement, formed look by look.

    `grace_s` is how long nobody is declared dead after a gap: as long as the groups' leases, and
    for a group whose lease was seen to be longer, that long.
    """

    def __init__(self, *, grace_s: float, gap_s: float = GAP_S) -> None:
        self._grace_s = grace_s
        self._gap_s = gap_s
        self._last_look: tuple[float, int] | None = None
        self._clear_since_s = 0.0
        self._leases: dict[str, _Lease] = {}

    def look(self, now_s: float, server_ms: int, ends_ms: Mapping[str, int]) -> Verdict:
        """Judge groups by when their leases end, on the server's clock.

        `now_s` is the scheduler's monotonic clock when the reply with `server_ms` and `ends_ms` had
        come. Groups that are not in `ends_ms` are forgotten.
        """
        if self._had_gap(now_s, server_ms, ends_ms):
            self._clear_since_s = now_s
        self._last_look = now_s, server_ms
        self._leases = {
            key: self._lease(key, until_ms, until_ms - server_ms)
            for key, until_ms in ends_ms.items()
        }
        clear_s = now_s - self._clear_since_s
        suspects = {key: lease for key, lease in self._leases.items() if lease.is_short}
        dead = (
            key
            for key, lease in suspects.items()
            if lease.is_over and clear_s >= max(self._grace_s, lease.longest_ms / 1000)
        )
        return Verdict(frozenset(dead), frozenset(suspects))

    def look_failed(self) -> None:
        """The server did not answer: whatever happened to it, the next look ends a gap."""
        self._last_look = None

    def _had_gap(self, now_s: float, server_ms: int, ends_ms: Mapping[str, int]) -> bool:
        if self._last_look is None:
            return True
        last_s, last_ms = self._last_look
        return (
            now_s - last_s > self._gap_s
            or server_ms - last_ms > self._gap_s * 1000
            or any(
                ends_ms.get(key, lease.until_ms) < lease.until_ms
                for key, lease in self._leases.items()
            )
        )

    def _lease(self, key: str, until_ms: int, left_ms: int) -> _Lease:
        before = self._leases.get(key)
        return _Lease(until_ms, left_ms, max(left_ms, before.longest_ms if before else 0))
