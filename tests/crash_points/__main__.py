"""Replay a scenario: `PYTHONPATH=.:tests python -m crash_points SCENARIO [TIMES]`."""

from __future__ import annotations

import asyncio
import sys

from crash_points.points import Scenario
from crash_points.shards import be_quiet, both_brokers, run_some, servers


def main() -> int:
    """Print what came of it on each kind of server; returns 1 if something was found wrong."""
    scenario, times = Scenario.parse(sys.argv[1]), int((*sys.argv, "1")[2])
    be_quiet()
    with servers(both_brokers()) as urls:
        outcomes = [o for url in urls for o in asyncio.run(run_some([scenario] * times, url))]
    for outcome in outcomes:
        reached = "not reached" if outcome.num_unreached else "reached"
        print(f"{outcome.scenario}: {reached}, {outcome.took_s} s")
        print("\n".join(outcome.problems) or "nothing wrong")
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
