"""Chaos for as long as you like: `python tests/chaos/run.py --seed 7 --seconds 180`.

It prints a report, and exits with 1 if anything was lost, doubled, wrong, stuck or left behind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chaos.campaign import MEAN_GAP_S, QUESTIONS_PER_S, Plan, carry_out
from chaos.faults import Targets


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="runs with this seed and the next ones")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--gap", type=float, default=MEAN_GAP_S, help="seconds between faults")
    parser.add_argument("--per-s", type=float, default=QUESTIONS_PER_S, help="requests per second")
    parser.add_argument(
        "--lossy", action="store_true", help="the server may lose what it wrote last"
    )
    parser.add_argument(
        "--poison", action="store_true", help="a request that ends its groups, and no other faults"
    )
    options = parser.parse_args()
    num_failed = 0
    for seed in range(options.seed, options.seed + options.runs):
        plan = Plan(
            seed=seed,
            seconds=options.seconds,
            server=options.server,
            mean_gap_s=options.gap,
            questions_per_s=options.per_s,
            lossy=options.lossy,
            poison=options.poison,
            targets=Targets(num_schedulers=2, num_groups=options.groups),
        )
        log_dir = Path(tempfile.mkdtemp(prefix=f"forebay-chaos-{seed}-"))
        report = carry_out(plan, log_dir)
        print(report, flush=True)
        if report.violations:
            num_failed += 1
            print(f"logs: {log_dir}", flush=True)
        else:
            shutil.rmtree(log_dir)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
