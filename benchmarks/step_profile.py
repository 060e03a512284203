"""Where a run's time goes: the bare engine on the mixed workload, operation by operation.

    python -m benchmarks.step_profile --model model.gguf [--dtype float16] [--quantization int8]
        [--workload mixed] [--seed 1 | --work DIR]

Matrix products are listed by role with their rate and their share of the machine's peak: what
torch's own product reaches on large square matrices, of float32 numbers (int8 ones for int8).
Attention is counted with the rotation and the writing of the pages. The rest is Python: scheduling,
building plans, sampling. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import Tensor

from benchmarks.arguments import (
    add_common_arguments,
    chosen_workloads,
    engine_words,
    workload_names,
)
from benchmarks.engine_driver import BareEngine
from benchmarks.flags import worker_settings
from benchmarks.machine import machine
from benchmarks.peers.channel import Request
from benchmarks.tables import print_table
from benchmarks.workloads import WARM_UP, Workload
from cache.pages import KVPages
from gpu_worker.engine.sharded import ShardedEngine
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.layers.choice import choose_operations
from gpu_worker.layers.operations import AttentionHeads, AttentionStep, Operations, Product
from gpu_worker.layers.rotary import RotaryEmbedding
from gpu_worker.precision import Precision, Role
from gpu_worker.service import rank_options
from gpu_worker.step_plan import StepPlan
from service import logs

_PEAK_SIZE = 2048
_PEAK_REPEATS = 7


@dataclass
class Stopwatch:
    """Seconds and floating-point operations by what they were spent on."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def operations(self, timed: Operations) -> Operations:
        """The same operations, timed."""

        def add_rms_norm(
            hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float
        ) -> Tensor:
            started = time.perf_counter()
            result = timed.add_rms_norm(hidden, delta, weight, eps)
            self.seconds["norm"] += time.perf_counter() - started
            return result

        def product(weight: Tensor, bias: Tensor | None, role: Role) -> Product:
            return _TimedProduct(timed.product(weight, bias, role), weight.numel(), role, self)

        def attention(plan: StepPlan, pages: KVPages, rotary: RotaryEmbedding) -> AttentionStep:
            attend = timed.attention(plan, pages, rotary)

            def timed_attend(qkv: Tensor, layer: int, heads: AttentionHeads) -> Tensor:
                started = time.perf_counter()
                result = attend(qkv, layer, heads)
                self.seconds["attention"] += time.perf_counter() - started
                return result

            return timed_attend

        return replace(timed, add_rms_norm=add_rms_norm, product=product, attention=attention)


@dataclass(frozen=True)
class _TimedProduct:
    product: Product
    num_weights: int
    role: str
    watch: Stopwatch

    @property
    def num_bytes(self) -> int:
        return self.product.num_bytes

    def __call__(self, values: Tensor) -> Tensor:
        started = time.perf_counter()
        result = self.product(values)
        self.watch.seconds[self.role] += time.perf_counter() - started
        self.watch.flops[self.role] += 2.0 * len(values) * self.num_weights
        return result


def main() -> None:
    """Run one workload after the other, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    arguments, rest = parser.parse_known_args()
    settings, _ = worker_settings(engine_words(arguments, rest))
    logs.configure(level="warning", log_format="json", service="engine")
    workloads, watch = chosen_workloads(arguments), Stopwatch()

    def choose(precision: Precision, device: torch.device) -> Operations:
        return watch.operations(choose_operations(precision, device))

    timed = mock.patch("gpu_worker.model_runner.choose_operations", choose)
    with timed, TemporaryDirectory() as directory:
        path = Path(directory) / "rendezvous"
        with ShardedEngine(1, path, rank_options(settings), LayerCounter()) as engine:
            bare = BareEngine(engine, {})
            _run(bare, workloads[WARM_UP])
            peak = measured_peak()
            for name in workload_names(arguments):
                watch.seconds.clear()
                watch.flops.clear()
                wall_s = _run(bare, workloads[name])
                _print(name, wall_s, watch, peak, settings.quantization)


def _run(bare: BareEngine, workload: Workload) -> float:
    requests = [
        Request(row.custom_id, list(row.prompt), row.num_output_tokens) for row in workload.rows
    ]
    bare.prepare(requests)
    started = time.perf_counter()
    bare.run(requests)
    return time.perf_counter() - started


def measured_peak() -> dict[str, float]:
    """Operations per second of torch's product of large matrices: float32, and int8."""
    # Beside our kernels the engine leaves torch one thread; the peak is that of all cores.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    wide = torch.randn(_PEAK_SIZE, _PEAK_SIZE)
    narrow = wide.mul(30).clamp(-127, 127).to(torch.int8)

    def rate(multiply: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(_PEAK_REPEATS):
            started = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - started)
        return 2.0 * _PEAK_SIZE**3 / statistics.median(seconds)

    peak = {
        "float32": rate(lambda: wide @ wide),
        "int8": rate(lambda: torch._int_mm(narrow, narrow)),
    }
    torch.set_num_threads(1)
    return peak


def _print(
    name: str, wall_s: float, watch: Stopwatch, peak: dict[str, float], quantization: str
) -> None:
    watch.seconds["rest"] = wall_s - sum(watch.seconds.values())
    rows = []
    for what, spent_s in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        rate = watch.flops[what] / spent_s
        of_peak = f"{rate / peak['float32']:.0%}" if rate else ""
        rows.append(
            [
                what,
                f"{spent_s:.2f}",
                f"{spent_s / wall_s:.0%}",
                f"{rate / 1e9:.0f}" if rate else "",
                of_peak,
            ]
        )
    print(
        f"\n{name}: {wall_s:.2f} s; peak {peak['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{peak['int8'] / 1e9:.0f} GOP/s in int8 ({machine()})"
    )
    print_table(["operation", "s", "share", "GFLOP/s", "of the float32 peak"], rows)
    print(
        json.dumps(
            {
                "benchmark": "step_profile",
                "workload": name,
                "machine": machine(),
                "quantization": quantization,
                "wall_s": round(wall_s, 3),
                "peak": peak,
                "seconds": dict(watch.seconds),
                "flops": dict(watch.flops),
            }
        )
    )


if __name__ == "__main__":
    main()
