"""How fast Forebay answers three workloads: the whole pipeline, the command, the bare engine.

    python -m benchmarks.throughput --model model.gguf [--workload mixed,shared_prefix,prefill]
        [--dtype float16] [--quantization int8] [--tensor-parallel-size 2]
        [--seed 1 | --work DIR] [--rounds 3] [--bare] [--reference DIR]

Measured per workload (`benchmarks/workloads.py`), in medians over the rounds:

- *pipeline*: a batch run through a broker, a scheduler and a worker group that are up, from before
  the first row is read until after the last one is written;
- *bare* (with `--bare`): the engine alone in one process on the same requests, in turns with the
  pipeline, and what the pipeline costs above it in wall time and CPU seconds;
- *command*: `forebay run-batch --model ...` from the command to the end of its last process;
- CPU seconds of each kind of process, and the peak memory of all processes together.

Flags that are not listed here go to the engine as they are. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.agreement import read_reference
from benchmarks.arguments import (
    add_common_arguments,
    chosen_workloads,
    engine_words,
    workload_names,
)
from benchmarks.command import measure_workload
from benchmarks.contenders import BARE, PIPELINE, ours
from benchmarks.drivers import DriverError
from benchmarks.report import header, title, workload_facts
from benchmarks.tables import print_table, seconds, shares
from benchmarks.turns import Score, Scores, take_turns


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Further flags go to the engine."
    )
    add_common_arguments(parser)
    parser.add_argument("--bare", action="store_true", help="measure the bare engine as well")
    parser.add_argument(
        "--no-command", action="store_true", help="leave out the command with its start-up"
    )
    arguments, rest = parser.parse_known_args()
    try:
        report = measure(arguments, engine_words(arguments, rest))
    except (DriverError, ValueError) as error:
        sys.exit(f"error: {error}")
    print_report(report)
    print(json.dumps(report))


def measure(arguments: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Everything that is printed."""
    names = workload_names(arguments)
    workloads = chosen_workloads(arguments)
    contenders = [PIPELINE, BARE] if arguments.bare else [PIPELINE]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drivers = [stack.enter_context(ours(kind, words)) for kind in contenders]
        scores = take_turns(
            drivers, workloads, names, num_rounds=arguments.rounds, directory=directory
        )
        start_s = {driver.name: round(driver.start_s, 2) for driver in drivers}
    report: dict[str, Any] = {
        **header("throughput", arguments, words[2:]),
        "ready_after_s": start_s,
        "workloads": {},
    }
    for name in names:
        workload = workloads[name]
        reference = read_reference(arguments.reference, name)
        report["workloads"][name] = {
            **workload_facts(workload),
            **{kind: s.report(workload, reference) for kind, s in scores[name].items()},
            "overhead": overhead(scores, name) if arguments.bare else None,
            "command": None
            if arguments.no_command
            else measure_workload(str(arguments.model), words[2:], workload, arguments.rounds),
        }
    return report


def overhead(scores: Scores, name: str) -> dict[str, float]:
    """What the pipeline takes above the bare engine, as shares of what that takes."""
    pipeline, bare = scores[name][PIPELINE], scores[name][BARE]
    return {
        "wall": round(_paired(pipeline, bare, "wall_s"), 4),
        "cpu": round(_paired(pipeline, bare, "total_cpu_s"), 4),
    }


def _paired(pipeline: Score, bare: Score, field: str) -> float:
    """The median over the rounds, each compared with its neighbour: load drifts over a run."""
    ratios = [
        getattr(ours, field) / getattr(theirs, field)
        for ours, theirs in zip(pipeline.rounds, bare.rounds, strict=True)
    ]
    return float(statistics.median(ratios)) - 1


def print_report(report: dict[str, Any]) -> None:
    """The tables."""
    print(title(report))
    rows = []
    for name, of_workload in report["workloads"].items():
        for kind in (PIPELINE, BARE, "command"):
            figures = of_workload.get(kind)
            if figures is not None:
                rows.append(
                    [
                        name,
                        kind,
                        seconds(figures),
                        f"{figures.get('output_tokens_per_s', '')}",
                        f"{figures['cpu_s']:.2f}",
                        f"{figures['peak_mib']:.0f}",
                        shares(figures.get("agreement")),
                    ]
                )
    header = ["workload", "what", "seconds (min-max)", "out/s", "CPU s", "MiB", "agreement"]
    print_table(header, rows)
    for name, of_workload in report["workloads"].items():
        kinds = of_workload[PIPELINE]["cpu_by_kind_s"]
        print(f"{name}: CPU s " + ", ".join(f"{kind} {s:.2f}" for kind, s in kinds.items()))
        if of_workload["overhead"] is not None:
            above = of_workload["overhead"]
            print(
                f"{name}: pipeline above bare engine: {above['wall']:+.1%} of wall time, "
                f"{above['cpu']:+.1%} of CPU"
            )
    for kind, start_s in report["ready_after_s"].items():
        print(f"{kind} ready after {start_s:.1f} s")


if __name__ == "__main__":
    main()
