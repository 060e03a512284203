"""What an exchange between two ranks of this machine costs: shared memory against gloo, in turns.

    python -m benchmarks.collectives [--rounds 5]

Both ranks enter each all-reduce together, each on a core of its own. Prints the median microseconds
by size over all rounds, what a straight line through the shared memory's has for latency and
bandwidth, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.process_tree import running
from gpu_worker.collectives.interface import Collectives
from gpu_worker.collectives.shared_memory import SharedMemoryCollectives
from gpu_worker.collectives.torch_distributed import TorchCollectives
from service import logs

COUNTS = (1, 576, 8 * 576, 32 * 576, 64 * 576, 128 * 576, 512 * 576, 1024 * 576)
"""Floats: rows of 576 as in a small model's decode and prefill steps."""

SHARED, GLOO = "shared memory", "gloo"
_PLAN_LEN = 700
"""Of a decode step's plan for 32 sequences of 200 tokens."""

_NUM_REPETITIONS = 100
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Time as a function of size: `latency_s` plus bytes / `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """One exchange of `num_bytes`."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Measured:
    """Median seconds by carrier, then by floats; a plan's broadcast by carrier."""

    all_reduce_s: dict[str, dict[int, float]]
    plan_s: dict[str, float]

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """What `python -m benchmarks.collectives` has printed last."""
        fields = json.loads(text)
        times = {c: {int(n): s for n, s in t.items()} for c, t in fields["all_reduce_s"].items()}
        return cls(times, fields["plan_s"])

    def cost(self, carrier: str = SHARED) -> Cost:
        """The least squares of the relative errors."""
        points = [(4.0 * count, s) for count, s in self.all_reduce_s[carrier].items()]
        weights = [1 / s**2 for _, s in points]
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        covariance = sum(
            w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)
        )
        variance = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = covariance / variance
        return Cost(max(0.0, mean_y - slope * mean_x), 1 / slope)


def measure(num_rounds: int = 5) -> Measured:
    """Measure in two processes of their own. Raises CalledProcessError."""
    command = [sys.executable, "-m", "benchmarks.collectives", "--rounds", str(num_rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured.from_json(done.stdout.splitlines()[-1])


def main() -> None:
    """Be rank 0, with another process as rank 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--follow", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logs.configure(level="warning", log_format="json", service="benchmark")
    torch.set_num_threads(1)
    if arguments.follow is not None:
        _measure_as(1, arguments.follow, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.collectives", "--follow", directory]
        command += ["--rounds", str(arguments.rounds)]
        with running(command):
            measured = _measure_as(0, Path(directory), arguments.rounds)
    _print(measured)


def _measure_as(rank: int, directory: Path, num_rounds: int) -> Measured:
    carriers: dict[str, Collectives] = {
        SHARED: SharedMemoryCollectives(rank, 2, directory / "shared", _TIMEOUT_S),
        GLOO: TorchCollectives(rank, 2, directory / "gloo", torch.device("cpu"), _TIMEOUT_S),
    }
    # After gloo has started its threads, which may go where they like.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    samples = {name: {count: [0.0] * 0 for count in COUNTS} for name in carriers}
    plans = {name: [0.0] * 0 for name in carriers}
    for i in range(num_rounds + 1):
        for name, carrier in carriers.items():
            for count in COUNTS:
                times = _all_reduces(carrier, carriers[SHARED], count)
                samples[name][count] += times if i else []  # the first round warms up
            times = _broadcasts(carrier, carriers[SHARED], rank)
            plans[name] += times if i else []
    for carrier in carriers.values():
        carrier.close()
    return Measured(
        {
            n: {c: statistics.median(s) for c, s in by_count.items()}
            for n, by_count in samples.items()
        },
        {name: statistics.median(times) for name, times in plans.items()},
    )


def _all_reduces(carrier: Collectives, meeting: Collectives, count: int) -> list[float]:
    values = torch.zeros(count)
    times = []
    for _ in range(_NUM_REPETITIONS):
        values.fill_(1.0)  # as a GEMM leaves them: in this core's cache
        meeting.minimum(0)
        started_s = time.perf_counter()
        carrier.all_reduce(values)
        times.append(time.perf_counter() - started_s)
    return times


def _broadcasts(carrier: Collectives, meeting: Collectives, rank: int) -> list[float]:
    """On rank 0: until rank 1 has it, and has said so over shared memory."""
    plan = torch.zeros(_PLAN_LEN, dtype=torch.int32)
    times = []
    for _ in range(_NUM_REPETITIONS):
        meeting.minimum(0)
        started_s = time.perf_counter()
        if rank == 0:
            carrier.send(plan)
        else:
            carrier.receive()
        meeting.minimum(0)
        times.append(time.perf_counter() - started_s)
    return times


def _print(measured: Measured) -> None:
    shared, gloo = (measured.all_reduce_s[name] for name in (SHARED, GLOO))
    print(f"{'all-reduce of 2 ranks, KiB':30} {'shared, us':>10} {'gloo, us':>10} {'ratio':>7}")
    for count in COUNTS:
        ratio = gloo[count] / shared[count]
        print(
            f"{count * 4 / 1024:30.1f} {shared[count] * 1e6:10.1f} {gloo[count] * 1e6:10.1f} "
            f"{ratio:7.1f}"
        )
    plan_us = {name: s * 1e6 for name, s in measured.plan_s.items()}
    print(f"{'a step plan and an answer':30} {plan_us[SHARED]:10.1f} {plan_us[GLOO]:10.1f}")
    cost = measured.cost()
    print(
        f"shared memory: {cost.latency_s * 1e6:.1f} us + bytes / {cost.bytes_per_s / 1e9:.1f} GB/s"
    )
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
