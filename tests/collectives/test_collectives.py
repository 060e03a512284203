"""What ranks exchange, as processes of their own: through shared memory, and through gloo."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from gpu_worker.collectives import shared_group
from gpu_worker.collectives.interface import CollectiveFailed

ROOT = Path(__file__).resolve().parents[2]
SHARED, GLOO = "shared memory", "gloo"

pytestmark = pytest.mark.skipif(
    not shared_group.is_available(2), reason="the compiled kernels are not there"
)


class RunRanks(Protocol):
    def __call__(
        self, scenario: str, size: int, *, carrier: str = SHARED, timeout_s: float = 60.0
    ) -> list[Any]:
        """What each rank returned; see `support.collective_ranks`."""


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
    # A name that is longer than a socket's may be.
    directory = tmp_path_factory.mktemp("d" * 100)
    with subprocess.Popen(
        [sys.executable, "-m", "support.collective_ranks", str(directory)],
        env={**environment, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(
            scenario: str, size: int, *, carrier: str = SHARED, timeout_s: float = 60.0
        ) -> list[Any]:
            order = {"scenario": scenario, "size": size, "carrier": carrier}
            stdin.write(json.dumps({**order, "timeout_s": timeout_s}) + "\n")
            stdin.flush()
            answers: list[Any] = json.loads(stdout.readline())
            return answers

        yield run
        stdin.close()
        process.wait(timeout=10)


@pytest.fixture(params=[(SHARED, 2), (SHARED, 3), (GLOO, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def carrier_and_size(request: pytest.FixtureRequest) -> tuple[str, int]:
    chosen: tuple[str, int] = request.param
    return chosen


def test_more_ranks_than_the_shared_memory_has_room_for_meet_through_torch() -> None:
    assert shared_group.is_available(64)
    assert not shared_group.is_available(65)
    # The kernels count likewise. Joining does not touch the memory yet.
    anywhere = ctypes.addressof(ctypes.create_string_buffer(1))
    shared_group.SharedGroup(anywhere, 0, 64, [], timeout_s=1.0).leave()
    with pytest.raises(CollectiveFailed, match="no group of 65 ranks"):
        shared_group.SharedGroup(anywhere, 0, 65, [], timeout_s=1.0)


def test_all_ranks_get_the_same_bits(
    run_ranks: RunRanks, carrier_and_size: tuple[str, int]
) -> None:
    carrier, size = carrier_and_size
    answers = run_ranks("sums", size, carrier=carrier)
    assert len({tuple(answer["digests"]) for answer in answers}) == 1
    if carrier == SHARED:  # gloo adds in the order of its ring
        assert all(answer["exact"] for answer in answers)


def test_columns_come_together_on_rank_0(
    run_ranks: RunRanks, carrier_and_size: tuple[str, int]
) -> None:
    carrier, size = carrier_and_size
    first, *others = run_ranks("gathers", size, carrier=carrier)
    assert first == [[rank + 1.0 for rank in range(size) for _ in range(3 + rank)]] * 4
    assert others == [[]] * (size - 1)


def test_all_ranks_learn_the_least_value(
    run_ranks: RunRanks, carrier_and_size: tuple[str, int]
) -> None:
    carrier, size = carrier_and_size
    assert run_ranks("minima", size, carrier=carrier) == [[2**40] * (size + 1)] * size


def test_messages_of_any_length_arrive_in_order(
    run_ranks: RunRanks, carrier_and_size: tuple[str, int]
) -> None:
    carrier, size = carrier_and_size
    lengths = (1, 0, 4_095, 4_096, 300_000, 7)
    expected = [[n, n * (n - 1) // 2] for n in lengths]
    assert run_ranks("messages", size, carrier=carrier) == [[]] + [expected] * (size - 1)


def test_a_plan_arrives_whole_and_so_does_the_end(
    run_ranks: RunRanks, carrier_and_size: tuple[str, int]
) -> None:
    carrier, size = carrier_and_size
    assert run_ranks("plans", size, carrier=carrier) == [None] + [True] * (size - 1)


def test_narrow_values_are_summed_too(run_ranks: RunRanks) -> None:
    assert run_ranks("narrow_sums", 2) == [[4.0]] * 2


def test_a_rank_that_does_not_come_in_time_ends_the_exchange_for_all(run_ranks: RunRanks) -> None:
    first, second = run_ranks("late", 2, timeout_s=0.3)
    assert first["failed"].endswith("the other ranks did not come within 0.3 s")
    assert 0.3 <= first["after_s"] < 5
    # Which of the two it sees first is chance.
    assert second["failed"].endswith(("another rank has given up", "another rank is gone"))


@pytest.mark.parametrize(("scenario", "dead"), [("dies", 1), ("lead_dies", 0)])
def test_the_death_of_a_rank_ends_the_wait_of_the_others(
    run_ranks: RunRanks, scenario: str, dead: int
) -> None:
    answers = run_ranks(scenario, 3)
    assert answers.pop(dead) is None
    for answer in answers:
        assert answer["failed"].endswith(("another rank has given up", "another rank is gone"))
        assert answer["after_s"] < 10  # far below the 60 s that an exchange may take


def test_a_rank_without_work_sleeps(run_ranks: RunRanks) -> None:
    _, follower = run_ranks("idles", 2)
    assert follower < 0.1


def test_nothing_lies_in_the_file_system_once_the_ranks_have_met(run_ranks: RunRanks) -> None:
    assert run_ranks("leftovers", 3) == [[]] * 3
