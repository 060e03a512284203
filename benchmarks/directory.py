"""The directory of cached blocks: longest prefixes, a group's end, upkeep, memory.

    python -m benchmarks.directory [--server packaged|PATH] [--groups 100] [--blocks 6250]

Starts a server of its own, on a Unix socket, and measures

- the query for the longest prefix of one prompt over all groups, against the design with a hash per
  block (`benchmarks.directory_queries`), on the same server in the same run; and for a batch of
  prompts at once;
- what becomes of a dead group's entry of a million blocks, and of another client meanwhile;
- the orchestrator's CPU time for keeping its group's entry up to date;
- the server's memory for an entry.

Prints tables (medians where there are rounds) and then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.directory_costs import measure_end, measure_memory, measure_upkeep
from benchmarks.directory_fleet import open_bench
from benchmarks.directory_queries import measure_batch, measure_queries
from benchmarks.machine import load, machine


def main() -> None:
    """Measure, and print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", help="'packaged', or a server's path; else as `forebay up`")
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=6250, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--held", type=int, default=1_000_000, help="blocks of the group that ends")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the upkeep")
    parser.add_argument("--step-ms", type=float, default=20.0, help="how long a step takes")
    report = asyncio.run(measure(parser.parse_args()))
    print(f"{report['server']} on {report['machine']}{load()}")
    for name in ("queries", "batch", "ends", "upkeep", "memory"):
        print_table(name, report[name])
    print(json.dumps(report))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements, one after the other."""
    async with open_bench(arguments.server) as bench:
        return {
            "benchmark": "directory",
            "machine": machine(),
            "server": bench.server,
            "queries": await measure_queries(
                bench,
                num_groups=arguments.groups,
                num_blocks=arguments.blocks,
                num_rounds=arguments.rounds,
            ),
            "batch": [await measure_batch(bench, num_groups=arguments.groups, num_prompts=16)],
            "ends": await measure_end(bench, num_blocks=arguments.held),
            "upkeep": await measure_upkeep(
                bench, num_steps=arguments.steps, step_ms=arguments.step_ms
            ),
            "memory": [await measure_memory(bench, num_blocks=arguments.held)],
        }


def print_table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each measure, one column for each row."""
    print(f"\n{name}")
    for measure in rows[0]:
        print(f"  {measure:32}" + "".join(f"{row[measure]!s:>24}" for row in rows))


if __name__ == "__main__":
    main()
