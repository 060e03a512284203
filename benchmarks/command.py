"""The offline command as a user meets it: start-up included, until the file is finished."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drivers import DriverError
from benchmarks.process_tree import children_cpu_s, running
from benchmarks.processes import MIB, cpu_seconds, peak_bytes
from benchmarks.tables import say
from benchmarks.workloads import Workload, write_workload

_WATCH_S = 0.25


@dataclass(frozen=True, slots=True)
class CommandRun:
    """One run of `forebay run-batch`.

    `wall_s` is from starting the command until its last process has ended, `first_answer_s` until
    the output file has a row; `num_tokens` were generated, by custom_id. `peak_bytes` is None if
    nobody watched the processes, which takes time from them.
    """

    first_answer_s: float
    wall_s: float
    cpu_s: float
    num_tokens: Mapping[str, int]
    peak_bytes: int | None
    cpu_by_kind_s: Mapping[str, float] | None

    @property
    def output_tokens_per_s(self) -> float:
        """Over the whole time."""
        return sum(self.num_tokens.values()) / self.wall_s


def measure_workload(
    model: str, flags: Sequence[str], workload: Workload, num_rounds: int
) -> dict[str, Any]:
    """Figures of the command on the workload, see `_measure`. Raises DriverError."""
    return _measure(partial(run_workload, model, flags, workload), workload.name, num_rounds)


def measure_file(
    model: str, flags: Sequence[str], input_path: Path, num_rounds: int
) -> dict[str, Any]:
    """Figures of the command on a file of batch rows, see `_measure`. Raises DriverError."""
    return _measure(partial(run_file, model, flags, input_path), input_path.name, num_rounds)


def _measure(run: Callable[..., CommandRun], name: str, num_rounds: int) -> dict[str, Any]:
    """Medians of `num_rounds` timed runs after one that is watched, for memory and CPU by kind."""
    watched = run(watch=True)
    runs: list[CommandRun] = []
    for i in range(num_rounds):
        runs.append(run())
        say(f"{name} round {i + 1} command: {runs[-1].wall_s:.2f} s")
    assert watched.peak_bytes is not None
    walls = [run.wall_s for run in runs]
    medians = {
        field: round(statistics.median(getattr(run, field) for run in runs), 3)
        for field in ("wall_s", "first_answer_s", "cpu_s", "output_tokens_per_s")
    }
    return {
        **medians,
        "wall_min_s": round(min(walls), 3),
        "wall_max_s": round(max(walls), 3),
        "peak_mib": round(watched.peak_bytes / MIB, 1),
        "cpu_by_kind_s": {k: round(s, 2) for k, s in (watched.cpu_by_kind_s or {}).items()},
    }


def run_workload(
    model: str, flags: Sequence[str], workload: Workload, *, watch: bool = False
) -> CommandRun:
    """Run the workload's rows through the command.

    Raises DriverError if a row has no answer, or one of another length than it asks for.
    """
    with tempfile.TemporaryDirectory() as folder:
        input_path = Path(folder) / "in.jsonl"
        write_workload(workload, input_path)
        run = run_file(model, flags, input_path, watch=watch)
    for row in workload.rows:
        if run.num_tokens.get(row.custom_id) != row.num_output_tokens:
            raise DriverError(f"{row.custom_id} has {run.num_tokens.get(row.custom_id)} tokens")
    return run


def run_file(
    model: str, flags: Sequence[str], input_path: Path, *, watch: bool = False
) -> CommandRun:
    """Run a file of batch rows through the command. Raises DriverError if a row has failed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        output_path = Path(folder) / "out.jsonl"
        output_path.touch()
        command = [sys.executable, "-m", "forebay", "run-batch", "--restart", "--model", model]
        command += ["--input", str(input_path.absolute()), "--output", str(output_path), *flags]
        cpu_before_s, started_s = children_cpu_s(), time.monotonic()
        with running(command, stdout=log, stderr=log) as process:
            first_answer_s, peak, kinds = _follow(process, output_path, started_s, watch)
        wall_s = time.monotonic() - started_s
        if process.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace")[-2000:]
            raise DriverError(f"forebay run-batch exited ({process.returncode}): {said}")
        return CommandRun(
            first_answer_s=first_answer_s,
            wall_s=wall_s,
            cpu_s=children_cpu_s() - cpu_before_s,
            num_tokens=_num_tokens(output_path),
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
            next_look_s = now_s + _WATCH_S
        time.sleep(0.01)
    ended_s = time.monotonic() - started_s
    first_s = ended_s if first_answer_s is None else first_answer_s
    return first_s, peak if watch else None, kinds if watch else None


def _num_tokens(output: Path) -> dict[str, int]:
    counts = {}
    for line in output.read_text().splitlines():
        answer = json.loads(line)
        if answer["error"] is not None:
            raise DriverError(f"{answer['custom_id']} has failed: {answer['error']}")
        counts[answer["custom_id"]] = answer["response"]["body"]["usage"]["completion_tokens"]
    return counts
