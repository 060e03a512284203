"""Command-line arguments that the comparisons share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.workloads import TIMED, Workload, load_workloads


def add_common_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What to run, and how often."""
    parser.add_argument("--model", type=Path, required=required, help="what Forebay loads")
    parser.add_argument("--workload", default=",".join(TIMED), help="names with commas between")
    parser.add_argument("--seed", type=int, default=1, help="of the generated requests")
    parser.add_argument(
        "--work", type=Path, help="a directory with NAME.ids.jsonl files, instead of a seed"
    )
    parser.add_argument("--limit", type=int, help="only so many requests of each workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--reference", type=Path, help="a directory with NAME.json: the right token ids"
    )


def chosen_workloads(arguments: argparse.Namespace) -> dict[str, Workload]:
    """All workloads by name, cut to `--limit`."""
    workloads = load_workloads(arguments.model, arguments.seed, arguments.work)
    return {
        name: Workload(name, workload.rows[: arguments.limit])
        for name, workload in workloads.items()
    }


def workload_names(arguments: argparse.Namespace) -> list[str]:
    """The workloads to run. Raises ValueError for an unknown one."""
    names = [name.strip() for name in str(arguments.workload).split(",")]
    for name in names:
        if name not in TIMED:
            raise ValueError(f"there is no workload {name!r}; take some of {', '.join(TIMED)}")
    if arguments.rounds < 1:
        raise ValueError("--rounds must be at least 1")
    return names


def engine_words(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """The model and all flags that are not ours, for whatever runs the engine.

    The model's path becomes absolute in `arguments` too: processes start in other directories.
    """
    arguments.model = arguments.model.expanduser().absolute()
    return ["--model", str(arguments.model), *rest]
