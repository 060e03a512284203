"""From the command to a pipeline that serves, and to its first token.

    python -m benchmarks.startup --model model.gguf [--rounds 5] [--cold] [-- FLAGS]

Runs `forebay run-batch` on one request for one token several times, after one warm-up, and reads
from the logs of its processes when each phase was over. Prints medians: seconds from the command to
the end of each phase ("ready" is when the worker group is known to the fleet with its model
loaded), to the first answer in the output file, and the CPU seconds of all processes. With --cold
the model's files are dropped from the system's cache before each round. FLAGS go to the command.
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
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.process_tree import children_cpu_s, running

PHASES = {
    "broker_s": ("forebay", "broker_started"),
    "worker_s": ("worker", "starting"),
    "engine_s": ("rank-0", "operations_chosen"),
    "loaded_s": ("rank-0", "model_loaded"),
    "ready_s": ("worker", "group joined"),
}
"""Measure -> the service and the event with which the phase is over."""

POLL_S = 0.002
TIMEOUT_S = 600.0
ROW = {
    "custom_id": "row",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "The first token", "max_tokens": 1, "temperature": 0},
}


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read the model from the disk")
    parser.add_argument("flags", nargs="*", help="flags for forebay run-batch, after --")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "forebay", "run-batch", "--restart", "--verbose"]
    command += ["--log-format", "json", "--model", str(arguments.model), *arguments.flags]
    prepare = (lambda: drop_from_cache(arguments.model)) if arguments.cold else (lambda: None)
    rounds = [run_once(command, prepare) for _ in range(1 + arguments.rounds)][1:]
    report = {
        "benchmark": "startup",
        "machine": machine(),
        "model": arguments.model.name,
        "cache": "cold" if arguments.cold else "warm",
        "flags": arguments.flags,
        "rounds": len(rounds),
        **{name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
    }
    for name, value in report.items():
        print(f"{name:15} {value:.2f}" if isinstance(value, float) else f"{name:15} {value}")
    print(json.dumps(report))


def run_once(command: list[str], prepare: Callable[[], None]) -> dict[str, float]:
    """Seconds from the command to each phase's end and to the answer, and all CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("in.jsonl", "out.jsonl", "log")}
        paths["in.jsonl"].write_text(json.dumps(ROW) + "\n")
        output = paths["out.jsonl"]
        output.touch()
        prepare()
        with paths["log"].open("wb") as log:
            started_s, cpu_before_s = time.time(), children_cpu_s()
            words = [*command, "--input", str(paths["in.jsonl"]), "--output", str(output)]
            with running(words, stdout=subprocess.DEVNULL, stderr=log) as process:
                while not output.stat().st_size and process.poll() is None:
                    time.sleep(POLL_S)
                first_token_s = time.time() - started_s
                process.wait(TIMEOUT_S)
        lines = paths["log"].read_text().splitlines()
        if process.returncode:
            sys.exit("the run failed: " + "\n".join(lines)[-2000:])
        ends_s = phase_ends(lines)
    return {
        **{name: end_s - started_s for name, end_s in ends_s.items()},
        "first_token_s": first_token_s,
        "cpu_s": children_cpu_s() - cpu_before_s,
    }


def phase_ends(lines: list[str]) -> dict[str, float]:
    """When each phase was over (Unix time), by its measure, as the logs of the processes say."""
    found: dict[tuple[str, str], float] = {}
    for line in lines:
        if line.startswith("{"):
            event = json.loads(line)
            at_s = datetime.fromisoformat(event["timestamp"]).timestamp()
            found.setdefault((event["service"], event["event"]), at_s)
    return {name: found[key] for name, key in PHASES.items() if key in found}


def drop_from_cache(path: Path) -> None:
    """Have the next reader of the file, or of the directory's files, wait for the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
