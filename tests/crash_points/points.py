"""Crash points by name: which call of which process is struck, and how.

    worker / EVALSHA commit / 3 / kill_after
    worker / EVALSHA commit / 3 / drop_reply x 2              two in a row
    worker / EVALSHA commit / 3 / kill_after + scheduler      both die at once
    worker / EVALSHA commit / 3 / kill_after >> scheduler / EVALSHA reclaim / 1 / drop_reply

In the last, the second fault strikes what follows from the first. A role that was killed by a fault
before goes on in its next life, and there the count begins anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from support.fault_injection import STRIKES, Fault, Strike

ROLES = ("producer", "scheduler", "worker", "consumer", "reader")


@dataclass(frozen=True, slots=True)
class Point:
    """One fault; the roles in `together` die when its process does."""

    role: str
    kind: str
    nth: int
    strike: Strike
    times: int = 1
    together: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As `parse` takes it."""
        times = f" x {self.times}" if self.times > 1 else ""
        together = "".join(f" + {role}" for role in self.together)
        return f"{self.role} / {self.kind} / {self.nth} / {self.strike}{times}{together}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises ValueError."""
        role, kind, nth, how = (part.strip() for part in text.split("/"))
        how, *together = (part.strip() for part in how.split("+"))
        strike, _, times = (part.strip() for part in how.partition(" x "))
        if strike not in STRIKES or not {role, *together} <= set(ROLES):
            raise ValueError(f"{text!r} is no crash point")
        return cls(role, kind, int(nth), strike, int(times or 1), tuple(together))

    @property
    def killed(self) -> tuple[str, ...]:
        """The roles that die of it."""
        return () if self.strike == "drop_reply" else (self.role, *self.together)


@dataclass(frozen=True, slots=True)
class Scenario:
    """The faults of one run, in the order in which they strike; none in an undisturbed run."""

    points: tuple[Point, ...] = ()

    def __str__(self) -> str:
        """As `parse` takes it."""
        return " >> ".join(map(str, self.points)) or "undisturbed"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises ValueError."""
        if text.strip() == "undisturbed":
            return cls()
        return cls(tuple(Point.parse(part) for part in text.split(">>")))

    def life_of(self, index: int) -> int:
        """In which life of its role the point of this index strikes, from 1."""
        role = self.points[index].role
        return 1 + sum(role in point.killed for point in self.points[:index])

    def faults_of(self, role: str) -> Sequence[Sequence[Fault]]:
        """The faults of a role, by its lives."""
        by_life: dict[int, list[Fault]] = defaultdict(list)
        for index, point in enumerate(self.points):
            if point.role == role:
                fault = Fault(point.kind, point.nth, point.strike, point.times)
                by_life[self.life_of(index)].append(fault)
        return [by_life[life] for life in range(1, max(by_life, default=0) + 1)]

    def dying_with(self, role: str, life: int) -> Sequence[str]:
        """The roles that die when this life of a role is ended by a fault."""
        return [
            other
            for index, point in enumerate(self.points)
            if point.role == role and point.killed and self.life_of(index) == life
            for other in point.together
        ]
