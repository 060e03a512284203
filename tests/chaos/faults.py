"""What goes wrong in a run, and when: a pure function of the seed.

Faults are drawn like cards from a deck that has every kind of fault in it, so that a run of a
minute meets each of them, in an order and at moments that only the seed knows. A fault that lasts
ends within the run, and no two of them that cannot go together meet on one target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal[
    "kill",  # SIGKILL, and a new process after a while
    "stop",  # SIGSTOP, then SIGCONT
    "cut",  # connections end
    "lose replies",  # commands are carried out, and one in four of them is not answered
    "slow",  # every packet is late
    "hold",  # nothing gets through, until all of it does
    "swallow",  # connections are half open
    "flush scripts",  # SCRIPT FLUSH
    "lose tail",  # SIGKILL of the server, whose file then lacks up to a second of what it wrote
]

MIN_S = 0.2
MAX_S = 8.0
"""How long a fault lasts: up to more than two leases."""

_SERVICE_ACTIONS: tuple[Action, ...] = (
    *("kill", "stop"),
    *("cut", "lose replies", "slow", "hold", "swallow"),
)
_RANK_ACTIONS: tuple[Action, ...] = ("kill", "stop")
_SERVER_ACTIONS: tuple[Action, ...] = ("kill", "stop", "flush scripts")
_CLIENT_ACTIONS: tuple[Action, ...] = ("cut", "lose replies", "slow", "hold", "swallow")
_INSTANT_ACTIONS: tuple[Action, ...] = ("cut", "flush scripts")


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """`action` befalls `target` at `at_s` of the run, and is over `for_s` later."""

    at_s: float
    action: Action
    target: str
    for_s: float

    def __str__(self) -> str:
        """One line of a log."""
        lasting = f" for {self.for_s:.1f} s" if self.for_s else ""
        return f"{self.at_s:6.2f} s  {self.action} {self.target}{lasting}"


@dataclass(frozen=True, slots=True)
class Targets:
    """The names of what a fault can befall; groups have ranks of the same number."""

    num_schedulers: int
    num_groups: int

    @property
    def schedulers(self) -> list[str]:
        """Names of the schedulers."""
        return [f"scheduler-{index}" for index in range(self.num_schedulers)]

    @property
    def groups(self) -> list[str]:
        """Names of the worker groups."""
        return [f"group-{index}" for index in range(self.num_groups)]

    @property
    def ranks(self) -> list[str]:
        """Names of the groups' ranks."""
        return [f"rank-{index}" for index in range(self.num_groups)]


SERVER = "server"
CLIENTS = "clients"
"""Producers and consumers, which live in the process that runs the chaos."""


def draw_faults(
    seed: int, seconds: float, targets: Targets, *, mean_gap_s: float, lossy: bool
) -> list[Fault]:
    """The faults of a run, in order; all are over after `seconds`.

    `lossy` has the server lose what it wrote last, as a machine that crashes does.
    """
    rng = random.Random(f"faults of {seed}")
    deck: list[tuple[Action, Sequence[str]]] = []
    busy_until_s: dict[str, float] = {}
    faults = []
    at_s = rng.uniform(0.5, 1.5)
    while at_s < seconds - MIN_S:
        deck = deck or _shuffled_deck(rng, targets, lossy=lossy)
        action, candidates = deck.pop()
        target = rng.choice(candidates)
        # Short ones are as telling as long ones, and leave more room for others.
        for_s = min(MIN_S * (MAX_S / MIN_S) ** rng.random(), seconds - at_s)
        if action in _INSTANT_ACTIONS or (action == "kill" and target in targets.ranks):
            for_s = 0.0  # a dead rank is its group's to replace
        if busy_until_s.get(target, 0.0) <= at_s:
            faults.append(Fault(round(at_s, 2), action, target, round(for_s, 2)))
            busy_until_s[target] = at_s + for_s
        at_s += rng.expovariate(1 / mean_gap_s)
    return faults


def _shuffled_deck(
    rng: random.Random, targets: Targets, *, lossy: bool
) -> list[tuple[Action, Sequence[str]]]:
    deck: list[tuple[Action, Sequence[str]]] = [
        *((action, targets.groups) for action in _SERVICE_ACTIONS),
        *((action, targets.groups) for action in _RANK_ACTIONS),
        *((action, targets.ranks) for action in _RANK_ACTIONS),
        *((action, targets.schedulers) for action in _SERVICE_ACTIONS),
        *((action, [SERVER]) for action in _SERVER_ACTIONS),
        *((action, [CLIENTS]) for action in _CLIENT_ACTIONS),
    ]
    if lossy:
        deck.append(("lose tail", [SERVER]))
    rng.shuffle(deck)
    return deck
