"""Contenders take turns on the same requests, and what came of it in medians."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.agreement import Outputs, agreement
from benchmarks.drivers import Driver, Round
from benchmarks.machine import load
from benchmarks.processes import MIB
from benchmarks.tables import say
from benchmarks.workloads import WARM_UP, Workload, write_workload


@dataclass(frozen=True, slots=True)
class Score:
    """A contender's rounds on one workload."""

    rounds: tuple[Round, ...]

    @property
    def wall_s(self) -> float:
        """The median."""
        return statistics.median(r.wall_s for r in self.rounds)

    @property
    def cpu_s(self) -> float:
        """The median over all processes."""
        return statistics.median(r.total_cpu_s for r in self.rounds)

    @property
    def peak_bytes(self) -> int:
        """The most of all rounds."""
        return max(r.peak_bytes for r in self.rounds)

    def cpu_by_kind(self) -> dict[str, float]:
        """The median of each kind of process, the most expensive first."""
        kinds = {kind for r in self.rounds for kind in r.cpu_s}
        medians = {k: statistics.median(r.cpu_s.get(k, 0.0) for r in self.rounds) for k in kinds}
        return dict(sorted(medians.items(), key=lambda item: -item[1]))

    def report(self, workload: Workload, reference: Outputs) -> dict[str, Any]:
        """All figures, for JSON."""
        walls = [r.wall_s for r in self.rounds]
        outputs = self.rounds[-1].outputs
        agreed = agreement(reference, outputs)
        return {
            "wall_s": round(self.wall_s, 3),
            "wall_min_s": round(min(walls), 3),
            "wall_max_s": round(max(walls), 3),
            "output_tokens_per_s": round(workload.num_output_tokens / self.wall_s, 1),
            "total_tokens_per_s": round(
                (workload.num_prompt_tokens + workload.num_output_tokens) / self.wall_s, 1
            ),
            "cpu_s": round(self.cpu_s, 3),
            "cpu_by_kind_s": {k: round(s, 3) for k, s in self.cpu_by_kind().items()},
            "peak_mib": round(self.peak_bytes / MIB, 1),
            "agreement": None
            if agreed is None
            else {name: round(share, 4) for name, share in asdict(agreed).items()},
        }


Scores = dict[str, dict[str, Score]]
"""By workload, then by contender."""


def take_turns(
    drivers: Sequence[Driver],
    workloads: Mapping[str, Workload],
    names: Sequence[str],
    *,
    num_rounds: int,
    directory: Path,
) -> Scores:
    """Warm everybody up; then, workload by workload, let each run a round after the other.

    The order turns round from one round to the next, so that nobody always follows the same one.
    Raises DriverError, and ValueError when a contender returns another number of tokens.
    """
    for name in (WARM_UP, *names):
        write_workload(workloads[name], directory / f"{name}.jsonl")
    for driver in drivers:
        driver.run(directory / f"{WARM_UP}.jsonl")
    scores: Scores = {}
    for name in names:
        rounds: defaultdict[str, list[Round]] = defaultdict(list)
        for i in range(num_rounds):
            for driver in drivers if i % 2 == 0 else reversed(drivers):
                result = driver.run(directory / f"{name}.jsonl")
                _check(driver.name, workloads[name], result.outputs)
                rounds[driver.name].append(result)
                say(f"{name} round {i + 1} {driver.name}: {result.wall_s:.2f} s{load()}")
        scores[name] = {d.name: Score(tuple(rounds[d.name])) for d in drivers}
    return scores


def _check(contender: str, workload: Workload, outputs: Outputs) -> None:
    for row in workload.rows:
        num_tokens = len(outputs[row.custom_id])
        if num_tokens != row.num_output_tokens:
            raise ValueError(
                f"{contender} gave {num_tokens} tokens for {row.custom_id} instead of "
                f"{row.num_output_tokens}"
            )
