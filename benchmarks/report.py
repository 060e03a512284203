"""What the reports of different programs on the same workloads have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import machine
from benchmarks.workloads import Workload


def header(
    benchmark: str, arguments: argparse.Namespace, engine_flags: Sequence[str]
) -> dict[str, Any]:
    """What was measured, on what and how often; `arguments` are those of `add_common_arguments`."""
    return {
        "benchmark": benchmark,
        "machine": machine(),
        "model": arguments.model.name,
        "engine_flags": list(engine_flags),
        "requests_from": str(arguments.work) if arguments.work else f"seed {arguments.seed}",
        "limit": arguments.limit,
        "num_rounds": arguments.rounds,
    }


def workload_facts(workload: Workload) -> dict[str, int]:
    """The size of a workload."""
    return {
        "num_requests": len(workload.rows),
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
    }


def title(report: Mapping[str, Any]) -> str:
    """The line above the tables."""
    what = " ".join([report["model"], *report["engine_flags"]])
    return f"{what} on {report['machine']}"
