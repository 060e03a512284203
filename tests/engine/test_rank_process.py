"""Rank processes of the stub engine: their life and their end, signals and errors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from gpu_worker.rank_options import STUB_MODEL_PATH, RankOptions, rank_command
from gpu_worker.rank_protocol import (
    AbortRequests,
    AddRequests,
    RankConnection,
    RankError,
    RankReady,
    StepOutput,
    Stop,
    ToRank,
)
from support.engine_fakes import assignment, rank_options
from wire.ids import RequestId
from wire.sampling import SamplingParams

EXIT_TIMEOUT_S = 20
ENDLESS = SamplingParams(ignore_eos=True)


@dataclass(frozen=True)
class Rank:
    process: subprocess.Popen[bytes]
    connection: RankConnection

    async def exit_status(self) -> int:
        return await asyncio.to_thread(self.process.wait, EXIT_TIMEOUT_S)

    async def receive_output(self) -> StepOutput:
        frame = await self.connection.receive()
        assert isinstance(frame, StepOutput)
        return frame


@contextlib.asynccontextmanager
async def rank(
    folder: Path, options: RankOptions | None = None, *, ready: bool = True
) -> AsyncIterator[Rank]:
    """One rank process of the stub engine."""
    options = options or rank_options(model_path=STUB_MODEL_PATH, stub_step_s=0.001)
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        command = rank_command(
            options, rank=0, size=1, rendezvous=str(folder / "rendezvous"), socket_fd=fd
        )
        process = subprocess.Popen(command, pass_fds=(fd,), stderr=subprocess.DEVNULL)
    connection = await RankConnection.open(ours)
    try:
        if ready:
            assert isinstance(await connection.receive(), RankReady)
        yield Rank(process, connection)
    finally:
        process.kill()
        process.wait()
        await connection.close()


async def test_requests_run_and_stop_ends_the_process(tmp_path: Path) -> None:
    async with rank(tmp_path) as one:
        requests = tuple(assignment(str(i), [i + 1] * 20) for i in range(20))
        await one.connection.send(AddRequests(requests))
        finished: list[str] = []
        while len(finished) < len(requests):
            output = await one.receive_output()
            finished += [o.request_id for o in output.outputs if o.finish_reason is not None]
        assert sorted(finished, key=int) == [str(i) for i in range(20)]
        await one.connection.send(Stop())
        assert await one.exit_status() == 0


async def test_an_aborted_request_is_gone_a_step_later(tmp_path: Path) -> None:
    async with rank(tmp_path) as one:
        await one.connection.send(AddRequests((assignment("a", [1], ENDLESS),)))
        await one.receive_output()
        await one.connection.send(AbortRequests((RequestId("a"),)))
        await one.connection.send(AddRequests((assignment("b", [1]),)))
        while "b" not in (names := [o.request_id for o in (await one.receive_output()).outputs]):
            assert names in (["a"], []), "steps from before the abort, or the abort's own"
        assert names == ["b"]


@pytest.mark.parametrize("frame", [Stop(), None], ids=["stop", "end of file"])
async def test_a_busy_rank_ends_when_told_to_or_when_nobody_listens(
    tmp_path: Path, frame: ToRank | None
) -> None:
    async with rank(tmp_path) as one:
        await one.connection.send(AddRequests((assignment("a", [1], ENDLESS),)))
        await one.receive_output()
        if frame is not None:
            await one.connection.send(frame)
        else:
            await one.connection.close()
        assert await one.exit_status() == 0


async def test_an_idle_rank_ends_with_its_connection(tmp_path: Path) -> None:
    async with rank(tmp_path) as one:
        await one.connection.close()
        assert await one.exit_status() == 0


async def test_signals_for_the_whole_terminal_are_left_to_the_orchestrator(tmp_path: Path) -> None:
    async with rank(tmp_path) as one:
        for number in (signal.SIGINT, signal.SIGTERM):
            one.process.send_signal(number)
        await one.connection.send(AddRequests((assignment("a", [1]),)))
        assert (await one.receive_output()).outputs[0].request_id == "a"


async def test_an_error_is_reported_before_the_process_ends(tmp_path: Path) -> None:
    options = rank_options(model_path=STUB_MODEL_PATH, block_size=0)
    async with rank(tmp_path, options, ready=False) as one:
        frame = await one.connection.receive()
        assert isinstance(frame, RankError)
        assert frame.code == "engine_failed"
        assert "ZeroDivisionError" in frame.message
        assert await one.connection.receive() is None
        assert await one.exit_status() == 1


async def test_a_missing_model_is_reported_as_such(tmp_path: Path) -> None:
    options = rank_options(model_path=str(tmp_path / "missing.gguf"))
    async with rank(tmp_path, options, ready=False) as one:
        frame = await one.connection.receive()
        assert isinstance(frame, RankError)
        assert frame.code == "model_error"
        assert "missing.gguf" in frame.message
        assert await one.exit_status() == 1


PARENT = """
import socket, subprocess, sys, time
from gpu_worker.rank_options import RankOptions, rank_command
ours, theirs = socket.socketpair()
fd = theirs.fileno()
# The rank gets both ends, so that no end of file tells it what happened.
command = rank_command(
    RankOptions.from_json(sys.argv[1]), rank=0, size=1, rendezvous=sys.argv[2], socket_fd=fd
)
rank = subprocess.Popen(command, pass_fds=(fd, ours.fileno()))
ours.recv(1)
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_rank_dies_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    options = rank_options(model_path=STUB_MODEL_PATH).to_json()
    command = [sys.executable, "-c", PARENT, options, str(tmp_path / "rendezvous")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
        orphan.wait(EXIT_TIMEOUT_S)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
