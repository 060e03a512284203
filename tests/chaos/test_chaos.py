"""Short runs of chaos; `python tests/chaos/run.py --seed 7 --seconds 180` makes long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.campaign import Plan, carry_out
from chaos.faults import Targets, draw_faults

RUNS = {
    # On a server that is killed, stopped and flushed of its scripts, but loses nothing.
    "all_that_was_written_lasts": Plan(seed=3, seconds=11, mean_gap_s=0.5),
    # On one that loses what it wrote last, as a machine does that crashes.
    "the_last_moments_are_lost": Plan(
        seed=6, seconds=9, server="valkey", mean_gap_s=0.5, lossy=True
    ),
    # A request that ends every group that computes it, and nothing else.
    "a_request_is_poison": Plan(seed=1, seconds=2, poison=True, questions_per_s=12),
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", RUNS.values(), ids=RUNS)
def test_nothing_is_lost_doubled_wrong_or_left_behind_while(plan: Plan, tmp_path: Path) -> None:
    report = carry_out(plan, tmp_path)
    assert not report.violations, f"{report}\nlogs: {tmp_path}"


@pytest.mark.parametrize("lossy", [False, True])
def test_a_seed_stands_for_its_faults(lossy: bool) -> None:
    targets = Targets(num_schedulers=2, num_groups=3)
    one, same, other = (
        draw_faults(seed, 180.0, targets, mean_gap_s=1.0, lossy=lossy) for seed in (7, 7, 8)
    )
    assert one == same != other
    assert one == sorted(one)
    assert all(fault.at_s + fault.for_s <= 180.01 for fault in one)
    assert {fault.action for fault in one} >= {"kill", "stop", "lose replies", "swallow"}
    assert ("lose tail" in {fault.action for fault in one}) == lossy


def test_two_faults_that_cannot_go_together_never_meet_on_one_target() -> None:
    targets = Targets(num_schedulers=1, num_groups=1)
    busy_until_s: dict[str, float] = {}
    for fault in draw_faults(1, 600.0, targets, mean_gap_s=0.1, lossy=True):
        assert fault.at_s >= busy_until_s.get(fault.target, 0.0) - 0.01
        busy_until_s[fault.target] = fault.at_s + fault.for_s
