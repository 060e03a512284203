"""The offline command as a user meets it: start-up included, until the file is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drivers import ROOT, DriverError
from benchmarks.processes import cpu_seconds, peak_bytes
from benchmarks.workloads import Workload, write_workload

WATCH_S = 0.25


@dataclass(frozen=True, slots=True)
class CommandRun:
    """One run of `forebay run-batch`.

    `wall_s` is from starting the command until its last process has ended, `first_answer_s` until
    the output file has a row. `peak_bytes` is None if nobody watched the processes, which takes
    time from them.
    """

    first_answer_s: float
    wall_s: float
    cpu_s: float
    peak_bytes: int | None
    cpu_by_kind_s: Mapping[str, float] | None


def run_command(
    model: Path, flags: Sequence[str], workload: Workload, *, watch: bool = False
) -> CommandRun:
    """Run the workload's file through the command. Raises DriverError if a row has no answer."""
    with tempfile.TemporaryDirectory() as folder:
        input_path, output_path = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_workload(workload, input_path)
        output_path.touch()
        words = ["--input", str(input_path), "--output", str(output_path), "--restart"]
        words += ["--model", str(model), *flags]
        with tempfile.TemporaryFile() as log:
            cpu_before_s, started_s = _children_cpu_s(), time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "forebay", "run-batch", *words],
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
            first_answer_s, peak, kinds = _follow(process, output_path, started_s, watch)
            wall_s = time.monotonic() - started_s
            if process.returncode:
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise DriverError(f"forebay run-batch exited ({process.returncode}): {said}")
        _check(workload, output_path)
        return CommandRun(
            first_answer_s=first_answer_s,
            wall_s=wall_s,
            cpu_s=_children_cpu_s() - cpu_before_s,
            peak_bytes=peak,
            cpu_by_kind_s=kinds,
        )


def _follow(
    process: subprocess.Popen[bytes], output: Path, started_s: float, watch: bool
) -> tuple[float, int | None, Mapping[str, float] | None]:
    """When the first answer came; with `watch`, the most memory and the last CPU times seen."""
    first_answer_s: float | None = None
    peak, kinds = 0, dict[str, float]()
    next_look_s = started_s
    while process.poll() is None:
        now_s = time.monotonic()
        if first_answer_s is None and output.stat().st_size:
            first_answer_s = now_s - started_s
        if watch and now_s >= next_look_s:
            peak = max(peak, peak_bytes(process.pid))
            for kind, seconds in cpu_seconds(process.pid).items():
                kinds[kind] = max(seconds, kinds.get(kind, 0.0))
            next_look_s = now_s + WATCH_S
        time.sleep(0.01)
    ended_s = time.monotonic() - started_s
    first_s = ended_s if first_answer_s is None else first_answer_s
    return first_s, peak if watch else None, kinds if watch else None


def _check(workload: Workload, output: Path) -> None:
    wanted = {row.custom_id: row.num_output_tokens for row in workload.rows}
    for line in output.read_text().splitlines():
        answer = json.loads(line)
        response = answer["response"]
        got = response["body"]["usage"]["completion_tokens"] if response else 0
        if wanted.pop(answer["custom_id"], None) != got:
            raise DriverError(f"{answer['custom_id']} has {got} tokens: {answer['error']}")
    if wanted:
        raise DriverError(f"{len(wanted)} rows have no answer")


def _children_cpu_s() -> float:
    """CPU seconds of all children that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system
