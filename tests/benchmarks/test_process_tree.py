"""Watching and ending processes that may themselves end at any moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import command, process_tree, processes
from benchmarks.drivers import Driver
from benchmarks.process_tree import end_tree, running
from benchmarks.processes import cpu_seconds, peak_bytes
from benchmarks.workloads import Row, Workload
from support.waiting import wait_until

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(100)"]
PARENT = f"""
import signal, subprocess, sys
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run({SLEEP!r})
"""


def descendants() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE  # an orphan's, for pytest to wait for
    ]


def test_a_process_that_has_ended_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read = processes._kib_fields
    # As if it had ended between the two files: a zombie's status says nothing of memory.
    monkeypatch.setattr(
        processes, "_kib_fields", lambda p: {"Pss": 9} if p.name == "smaps_rollup" else read(p)
    )
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as zombie:
        process = psutil.Process(zombie.pid)
        assert wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert peak_bytes(zombie.pid) == 0
        assert cpu_seconds(zombie.pid) == {}


@pytest.mark.parametrize("flags", [[], ["--stubborn"]])
def test_an_exception_ends_the_command_and_what_it_started(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_tree, "_END_TIMEOUT_S", 0.2 if flags else 10.0)
    before = descendants()

    def fail() -> None:
        with running([sys.executable, "-S", "-c", PARENT, *flags]):
            assert wait_until(lambda: len(descendants()) == len(before) + 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert descendants() == before


def test_the_end_of_a_tree_that_has_ended_is_no_work() -> None:
    with running([sys.executable, "-S", "-c", "raise SystemExit(3)"]) as process:
        pass
    end_tree(process)
    assert process.returncode == 3


def test_an_exception_while_following_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pid: int) -> int:
        raise RuntimeError("no memory to be seen")

    monkeypatch.setattr(command, "peak_bytes", fail)
    before = descendants()
    with pytest.raises(RuntimeError, match="no memory to be seen"):
        command.run_workload("stub:", [], Workload("one", (Row("a", (1, 2), 1),)), watch=True)
    assert descendants() == before


def test_a_contender_that_cannot_start_leaves_nothing_open() -> None:
    with pytest.raises(FileNotFoundError):
        Driver("missing", [str(Path("/no/such/python"))]).__enter__()
