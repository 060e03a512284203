"""Any file of requests through the offline command as a user meets it, start-up included.

    python -m benchmarks.batch_run --model model.gguf [--input FILE] [--rounds 3] [-- FLAGS]

Runs `forebay run-batch` several times after a run whose processes are watched, and prints medians:
seconds from the command to the first answer in the output file and to the end, output tokens per
second over the whole time, CPU seconds; and the peak memory of all processes together, of the
watched run. FLAGS go to `forebay run-batch` as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.command import measure_file
from benchmarks.drivers import DriverError
from benchmarks.machine import machine


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", type=Path, default=Path("examples/prompts.jsonl"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags for forebay run-batch, after --")
    arguments = parser.parse_args()
    try:
        figures = measure_file(arguments.model, arguments.flags, arguments.input, arguments.rounds)
    except DriverError as error:
        sys.exit(f"error: {error}")
    report = {
        "benchmark": "batch_run",
        "machine": machine(),
        "model": Path(arguments.model).name,
        "input": str(arguments.input),
        "flags": arguments.flags,
        "rounds": arguments.rounds,
        **figures,
    }
    for name, value in report.items():
        print(f"{name:20} {value:.2f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
