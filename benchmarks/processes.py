"""What a tree of processes costs: CPU seconds by kind of process, and peak memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.process_tree import tree

_KIB = 1024
MIB = 1024 * 1024

_KINDS = {
    "gpu_worker.rank": "rank",
    "gpu_worker": "orchestrator",
    "scheduler": "scheduler",
    "benchmarks.pipeline_driver": "command",
    "benchmarks.engine_driver": "engine",
    "benchmarks.orchestration": "command",
    "forebay": "command",
}
"""By the module that Python runs."""

_BROKERS = ("redis-server", "valkey-server")


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU seconds that the process and its living descendants have used so far, by kind."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in tree(pid):
        try:
            times = process.cpu_times()
            command_line = process.cmdline()
        except psutil.Error:
            continue  # it has just ended
        if command_line:  # one that is ending has none
            seconds[kind_of(command_line)] += times.user + times.system
    return dict(seconds)


def peak_bytes(pid: int) -> int:
    """The most memory that the tree of processes can have held at a time, swap left out.

    Each process's present proportional set size (shared pages are counted once over all processes)
    plus what it once held above its present resident size, as the kernel notes it: an upper bound,
    since the processes need not have had their peaks together. Reading it walks the page tables,
    which takes 30 ms a GiB: not for timed moments.
    """
    total = 0
    for process in tree(pid):
        try:
            proportional = _kib_fields(Path(f"/proc/{process.pid}/smaps_rollup"))["Pss"]
            status = _kib_fields(Path(f"/proc/{process.pid}/status"))
            total += proportional + status["VmHWM"] - status["VmRSS"]
        except (OSError, KeyError):
            # It has just ended: its files are gone or, until its parent has waited for it, hold
            # nothing about memory.
            continue
    return total * _KIB


def kind_of(command_line: list[str]) -> str:
    """What a process is to us: the module that it runs, or its program's name."""
    if "-m" in command_line[:-1]:
        module = command_line[command_line.index("-m") + 1]
        return _KINDS.get(module, module)
    if any(broker in part for part in command_line[:2] for broker in _BROKERS):
        return "broker"
    return Path(command_line[0]).name


def _kib_fields(path: Path) -> dict[str, int]:
    """The fields of a /proc file that are in KiB."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0])
    return fields
