"""A process ends when it is told to, and a child when its parent does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from forebay.child import Child
from service.die_with_parent import command_line
from service.lifecycle import shutdown_signals, unless_stopped
from support.waiting import wait_until

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_for_an_orderly_end(signal_number: int) -> None:
    async with shutdown_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal_number)
        await asyncio.wait_for(stop.wait(), 5)


def test_the_second_signal_ends_the_process_at_once() -> None:
    program = """
import asyncio
from service.lifecycle import shutdown_signals

async def stubborn():
    async with shutdown_signals() as stop:
        print("ready", flush=True)
        await stop.wait()
        print("asked", flush=True)
        await asyncio.sleep(60)

asyncio.run(stubborn())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.readline() == b"asked\n"
        process.terminate()
        assert process.wait(timeout=5) == 128 + signal.SIGTERM


async def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> str:
        return "done"

    assert await unless_stopped(work(), asyncio.Event()) == "done"


async def test_work_is_cancelled_when_the_stop_comes_first() -> None:
    stop = asyncio.Event()
    cancelled = asyncio.Event()

    async def work() -> str:
        try:
            stop.set()
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "done"

    assert await unless_stopped(work(), stop) is None
    assert cancelled.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_child_dies_with_its_parent() -> None:
    parent_program = (
        "import subprocess, sys, time\n"
        "from service.die_with_parent import command_line\n"
        f"child = subprocess.Popen(command_line({SLEEPER!r}))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_child_whose_parent_was_gone_before_it_could_ask_ends_at_once() -> None:
    orphan = command_line(SLEEPER, parent_pid=2**22 + 1)
    assert subprocess.run(orphan, timeout=10).returncode == -signal.SIGKILL


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that takes nothing")
async def test_a_child_whose_log_cannot_be_written_is_not_held_up() -> None:
    program = [sys.executable, "-c", "print(('x' * 99 + chr(10)) * 10_000, 'the end')"]
    child = await Child.start(
        "talkative", program, environment=dict(os.environ), log_path=Path("/dev/full"), echo=False
    )
    try:
        assert await asyncio.wait_for(child.wait(), 10) == 0
    finally:
        await child.stop(timeout_s=1)
    assert "the end" in str(child.failure())
