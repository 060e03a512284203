"""Groups that beat and schedulers that look, on a virtual clock: the fleet's leases, no server.

Beats follow the heartbeat's rule (`gpu_worker/heartbeat.py`): one is due `interval_s` after the
reply to the one before, and a try that gets no reply in time is given up and made again. What
happens to messages is unkind: a spike holds a try up on its way to the server, and a try that was
given up never arrives.

`python -m support.lease_simulation` (in `tests`) prints how many groups are wrongly declared dead,
over the size of the spikes; it takes some minutes.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from gpu_worker.heartbeat import FIRST_RETRY_S, MAX_RETRY_S, patience_s
from scheduler.policy.leases import LeaseWatch, Verdict

ROUND_TRIP_S = 0.001
IDLE_POLL_S = 0.25
BUSY_POLL_S = 0.02

_SERVER_EPOCH_MS = 1_700_000_000_000

Away: TypeAlias = Literal["restarts", "stopped", "cut off"]
Spike: TypeAlias = Callable[[random.Random], float]


@dataclass(frozen=True, slots=True)
class Beats:
    """How groups beat; `spike_s` draws how long one of the `share` of tries that are hit lasts.

    With `stalls` it is not the try that is held up but the group: what it tries until the spike is
    over arrives then.
    """

    interval_s: float = 2.0
    timeout_s: float = 3.6
    share: float = 0.0
    spike_s: Spike = lambda rng: 0.0
    stalls: bool = False

    def patience_s(self, num_failed: int) -> float:
        """How long a try may take that follows so many failed ones."""
        return patience_s(self.interval_s, self.timeout_s, num_failed)

    def pause_s(self, num_failed: int) -> float:
        """How long to wait after so many tries that failed."""
        return min(FIRST_RETRY_S * 2.0 ** (num_failed - 1), MAX_RETRY_S)


def exponential(mean_s: float, *, uniform_s: float = 0.0) -> Spike:
    """Spikes of exponential length, and up to `uniform_s` on top."""

    def spike_s(rng: random.Random) -> float:
        return rng.expovariate(1 / mean_s) + rng.uniform(0, uniform_s)

    return spike_s


@dataclass(slots=True)
class Scheduler:
    """A scheduler's watch, what it saw last, and when it is paused."""

    watch: LeaseWatch
    poll_s: float
    paused: tuple[float, float] = (0.0, 0.0)
    on_look: Callable[[float, Verdict], None] = lambda now_s, verdict: None


@dataclass(slots=True)
class Simulation:
    """`declared` has every declaration of a death: when, and of which group.

    `server_away` is a span of time in which the server answers nobody. While it restarts it refuses
    connections; when it was stopped, what it was sent lies there until it goes on; when it was cut
    off, that is lost, and nobody is told.
    """

    beats: Beats = Beats()
    num_groups: int = 200
    seed: int = 0
    server_away: tuple[float, float] = (0.0, 0.0)
    away_means: Away = "restarts"
    declared: list[tuple[float, str]] = field(default_factory=list)
    groups: list[str] = field(init=False)
    leases: dict[str, int] = field(default_factory=dict)
    _killed_s: dict[str, float] = field(default_factory=dict)
    _stalled_until_s: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _num_events: int = 0
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self.groups = [f"g{i}:1" for i in range(self.num_groups)]
        for key in self.groups:
            self._try_at(self._rng.uniform(0, self.beats.interval_s), key)

    def add_scheduler(self, *, poll_s: float = IDLE_POLL_S) -> Scheduler:
        """A scheduler that starts once all groups have beaten."""
        scheduler = Scheduler(LeaseWatch(grace_s=self.beats.timeout_s), poll_s)
        first_s = self.beats.interval_s + self._rng.uniform(0, poll_s)
        self.at(first_s, lambda now_s: self._look(now_s, scheduler))
        return scheduler

    def kill(self, key: str, at_s: float) -> None:
        """The group sends nothing from then on."""
        self._killed_s[key] = at_s

    def at(self, time_s: float, event: Callable[[float], None]) -> None:
        """Have something happen at a time."""
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            time_s, _, event = heapq.heappop(self._events)
            event(time_s)

    def _try_at(self, time_s: float, key: str, num_failed: int = 0) -> None:
        self.at(time_s, lambda now_s: self._try(now_s, key, num_failed))

    def _try(self, now_s: float, key: str, num_failed: int) -> None:
        if now_s >= self._killed_s.get(key, now_s + 1):
            return
        arrival_s, known_s = self._sent(now_s, key, now_s + self.beats.patience_s(num_failed))
        if arrival_s is not None:
            self.at(arrival_s, lambda now_s: self._renew(now_s, key))
        if arrival_s == known_s:
            self._try_at(known_s + self.beats.interval_s, key)
        else:
            self._try_at(known_s + self.beats.pause_s(num_failed + 1), key, num_failed + 1)

    def _sent(self, now_s: float, key: str, give_up_s: float) -> tuple[float | None, float]:
        """When a try arrives, if it does; and when the group knows, or knows no better."""
        away_s, back_s = self.server_away
        arrival_s = now_s + self._delay_s(now_s, key)
        if not away_s <= arrival_s < back_s:
            return (arrival_s, arrival_s) if arrival_s <= give_up_s else (None, give_up_s)
        if self.away_means == "stopped":
            return back_s, min(back_s, give_up_s)
        if self.away_means == "cut off":
            return None, give_up_s
        return None, min(arrival_s, give_up_s)

    def _delay_s(self, now_s: float, key: str) -> float:
        stalled_s = self._stalled_until_s.get(key, 0.0) - now_s
        if stalled_s > 0:
            return stalled_s
        if self._rng.random() >= self.beats.share:
            return ROUND_TRIP_S
        spike_s = self.beats.spike_s(self._rng)
        if self.beats.stalls:
            self._stalled_until_s[key] = now_s + spike_s
        return spike_s

    def _renew(self, now_s: float, key: str) -> None:
        self.leases[key] = _server_ms(now_s + self.beats.timeout_s)

    def _look(self, now_s: float, scheduler: Scheduler) -> None:
        paused_s, resumed_s = scheduler.paused
        away_s, back_s = self.server_away
        if paused_s <= now_s < resumed_s:
            self.at(resumed_s, lambda now_s: self._look(now_s, scheduler))
            return
        if away_s <= now_s < back_s and self.away_means != "restarts":
            self.at(back_s, lambda now_s: self._look(now_s, scheduler))
            return
        if away_s <= now_s < back_s:
            scheduler.watch.look_failed()
        else:
            verdict = scheduler.watch.look(now_s, _server_ms(now_s), self.leases)
            for key in sorted(verdict.dead):
                del self.leases[key]
                self.declared.append((now_s, key))
            scheduler.on_look(now_s, verdict)
        self.at(now_s + scheduler.poll_s, lambda now_s: self._look(now_s, scheduler))


def _server_ms(now_s: float) -> int:
    return _SERVER_EPOCH_MS + int(now_s * 1000)


def num_false_deaths(beats: Beats, *, seed: int = 0) -> int:
    """How many of 200 groups, all alive, are declared dead in ten minutes."""
    simulation = Simulation(beats, seed=seed)
    simulation.add_scheduler()
    simulation.run(600.0)
    return len(simulation.declared)


def _print_curve(num_runs: int = 8) -> None:
    rules = {
        "2/3.6 s": Beats(),
        "2.5/4.6 s": Beats(2.5, 4.6),
        "2/3.6 s, groups stall": Beats(stalls=True),
        "2.5/4.6 s, groups stall": Beats(2.5, 4.6, stalls=True),
    }
    spikes = {f"{mean_s:g} s": exponential(mean_s) for mean_s in (0.1, 0.2, 0.3, 0.4, 0.5, 1, 2)}
    spikes["0.5 s, and up to 2 s"] = exponential(0.5, uniform_s=2)
    for rule, beats in rules.items():
        for size, spike_s in spikes.items():
            disturbed = replace(beats, share=0.05, spike_s=spike_s)
            deaths = sum(num_false_deaths(disturbed, seed=seed) for seed in range(num_runs))
            print(f"{rule:28}{size:22}{deaths / num_runs / 200:8.2%}", flush=True)


if __name__ == "__main__":
    _print_curve()
