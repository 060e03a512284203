"""The offline batch run as a user meets it: the whole command, start-up included.

    python -m benchmarks.batch_run --model model.gguf [--input FILE] [--rounds 3] [-- FLAGS]

Runs `forebay run-batch` several times after one warm-up, and prints medians: seconds from the
command to the first answer in the output file and to the end, output tokens per second over the
whole time, and the peak memory of all its processes together (proportional set size, so that
shared pages count once; sampled twice a second, the warm-up left out). FLAGS go to
`forebay run-batch` as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.5
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the command."""

    first_answer_s: float
    wall_s: float
    cpu_s: float
    num_output_tokens: int
    peak_mib: float


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", default="examples/prompts.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags for forebay run-batch, after --")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "forebay", "run-batch", "--restart"]
    command += ["--model", arguments.model, "--input", arguments.input, *arguments.flags]
    rounds = [run_once(command) for _ in range(1 + arguments.rounds)][1:]
    report = {
        "benchmark": "batch_run",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "model": Path(arguments.model).name,
        "input": arguments.input,
        "flags": arguments.flags,
        "rounds": len(rounds),
        "num_output_tokens": statistics.median(r.num_output_tokens for r in rounds),
        "first_answer_s": statistics.median(r.first_answer_s for r in rounds),
        "wall_s": statistics.median(r.wall_s for r in rounds),
        "cpu_s": statistics.median(r.cpu_s for r in rounds),
        "output_tokens_per_s": statistics.median(r.num_output_tokens / r.wall_s for r in rounds),
        "peak_mib": statistics.median(r.peak_mib for r in rounds),
    }
    for name, value in report.items():
        print(f"{name:20} {value:.2f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(report))


def run_once(command: list[str]) -> Round:
    """Run the command to its end, watching its output file and its processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.jsonl"
        output.touch()
        started_s, cpu_before_s = time.monotonic(), _children_cpu_s()
        process = subprocess.Popen(
            [*command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        first_answer_s: float | None = None
        peak_bytes = 0
        next_sample_s = started_s
        while process.poll() is None:
            now_s = time.monotonic()
            if first_answer_s is None and output.stat().st_size:
                first_answer_s = now_s - started_s
            if now_s >= next_sample_s:
                peak_bytes = max(peak_bytes, _tree_bytes(process.pid))
                next_sample_s = now_s + SAMPLE_S
            time.sleep(0.01)
        wall_s = time.monotonic() - started_s
        if process.returncode or first_answer_s is None:
            assert process.stderr is not None
            sys.exit(f"the run failed: {process.stderr.read().decode()[-2000:]}")
        return Round(
            first_answer_s=first_answer_s,
            wall_s=wall_s,
            cpu_s=_children_cpu_s() - cpu_before_s,
            num_output_tokens=_output_tokens(output),
            peak_mib=peak_bytes / MIB,
        )


def _children_cpu_s() -> float:
    """CPU seconds of all children that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _output_tokens(output: Path) -> int:
    with output.open() as lines:
        return sum(
            json.loads(line)["response"]["body"]["usage"]["completion_tokens"] for line in lines
        )


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has just ended
    except psutil.Error:
        pass
    return total


if __name__ == "__main__":
    main()
