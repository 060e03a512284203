"""A job of 64 requests survives whatever of its processes dies, around whichever of its calls.

The points are enumerated from recordings of undisturbed runs (`enumeration`); each is a run of its
own, in which users, schedulers and worker groups are the real ones, on a real server, and after
which everything is looked at (`checks`): 64 right results, each told once; streams without gap or
repetition; nothing left over; at most a block of each request in flight computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from crash_points import enumeration
from crash_points.points import Scenario
from crash_points.running import Outcome
from crash_points.shards import both_brokers, record, run_all, servers

NUM_RECORDINGS = 24
MAX_UNREACHED = 0.03
MAX_FALSE_ALARMS = 0.01
REPLAY = "PYTHONPATH=.:tests python -m crash_points"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server_urls() -> Iterator[list[str]]:
    """Two servers, of two kinds if there are two: each runs every other scenario."""
    with servers(both_brokers()) as urls:
        yield urls


@pytest.fixture(scope="module")
def undisturbed(server_urls: list[str]) -> list[Outcome]:
    """Runs without a fault, which show what calls there are."""
    outcomes = record([Scenario()], NUM_RECORDINGS, server_urls)
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    return outcomes


def test_every_point_of_an_undisturbed_job(
    server_urls: list[str], undisturbed: list[Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios = enumeration.every_point(undisturbed)
    _check("every call of every process", scenarios, server_urls, capsys)


def test_every_point_of_each_recovery(
    server_urls: list[str], undisturbed: list[Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    crashes = [Scenario((crash,)) for crash in enumeration.CRASHES]
    recordings = record(crashes, NUM_RECORDINGS // 6, server_urls)
    scenarios = [
        scenario
        for crash in enumeration.CRASHES
        for scenario in enumeration.every_recovery(crash, undisturbed, recordings)
    ]
    _check("every call of every recovery", scenarios, server_urls, capsys)


def test_two_things_at_once(
    server_urls: list[str], undisturbed: list[Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios = [*enumeration.combinations(undisturbed)]
    _check("two replies in a row lost, two processes dead", scenarios, server_urls, capsys)


def _check(
    title: str,
    scenarios: Sequence[Scenario],
    server_urls: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started_s = time.monotonic()
    outcomes = run_all(scenarios, server_urls)
    # A run may have had fewer calls than the recordings, or a group that was too slow for its
    # lease because the machine was busy: those say nothing of the point, and get another chance.
    again = [o for o in outcomes if o.num_unreached or o.had_false_alarm]
    outcomes += run_all([Scenario.parse(outcome.scenario) for outcome in again], server_urls)
    reached = {o.scenario for o in outcomes if not o.num_unreached and not o.had_false_alarm}
    num_missed = len({str(scenario) for scenario in scenarios} - reached)
    num_alarms = sum(outcome.had_false_alarm for outcome in outcomes)
    with capsys.disabled():
        print(f"\n\n{title}:\n{enumeration.table(scenarios)}")
        print(
            f"{len(outcomes)} runs in {time.monotonic() - started_s:.0f} s, {num_missed} points "
            f"not reached, {num_alarms} false alarms; computed again of one request at most "
            f"{max(outcome.most_unstreamed_again for outcome in outcomes)} tokens, "
            f"{max(outcome.most_streamed_again for outcome in outcomes)} if it streams"
        )
    failures = [
        f"{REPLAY} '{outcome.scenario}'\n    " + "\n    ".join(outcome.problems[:5])
        for outcome in outcomes
        if outcome.problems
    ]
    assert not failures, f"{len(failures)} runs went wrong:\n" + "\n".join(failures[:20])
    assert num_missed <= MAX_UNREACHED * len(scenarios)
    assert num_alarms <= MAX_FALSE_ALARMS * len(outcomes)
