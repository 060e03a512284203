"""Rank 0's reports of a long step: they come while it runs, and only while it gets on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from gpu_worker.engine.stub import StubEngine
from gpu_worker.layer_progress import LayerCounter, ProgressReporter
from gpu_worker.rank import serve
from gpu_worker.rank_protocol import (
    AbortRequests,
    AddRequests,
    RankChannel,
    RankConnection,
    StepOutput,
    StepProgress,
    Stop,
)
from support.engine_fakes import assignment, hashing_engine, rank_options
from wire.ids import RequestId
from wire.sampling import SamplingParams

INTERVAL_S = 0.02
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def test_layers_are_reported_and_their_absence_is_not(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    layers = LayerCounter()
    connection = await RankConnection.open(ours)
    with ProgressReporter(RankChannel(theirs), layers, INTERVAL_S):
        layers.add()
        assert await connection.receive() == StepProgress(1)
        layers.add()
        layers.add()
        frame = await connection.receive()
        assert isinstance(frame, StepProgress)
        assert 2 <= frame.num_layers <= 3
    theirs.close()
    while (frame := await connection.receive()) is not None:
        assert frame == StepProgress(3), "nothing is reported twice"
    await connection.close()


def test_an_orchestrator_that_is_gone_ends_the_reports_and_not_the_rank(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    layers = LayerCounter()
    ours.close()
    with ProgressReporter(RankChannel(theirs), layers, 0.001) as reporter:
        layers.add()
        reporter._thread.join(10)
        assert not reporter._thread.is_alive()


async def test_a_step_that_is_long_reports_before_it_is_done(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    channel, layers = RankChannel(theirs), LayerCounter()
    engine = StubEngine(rank_options(stub_step_s=0.5), layers)
    connection = await RankConnection.open(ours)
    with ProgressReporter(channel, layers, INTERVAL_S):
        rank = threading.Thread(target=serve, args=(channel, engine))
        rank.start()
        await connection.send(AddRequests((assignment("a", [1], ENDLESS),)))
        frames = [await connection.receive() for _ in range(4)]
        assert [type(frame) for frame in frames] == [StepProgress] * 4
        await connection.send(Stop())
        while not isinstance(await connection.receive(), StepOutput):
            pass
        rank.join()
    await connection.close()


async def test_an_abort_is_answered_with_what_it_has_freed_also_when_nothing_else_is_left(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    engine, _ = hashing_engine(max_model_len=100_000)
    connection = await RankConnection.open(ours)
    rank = threading.Thread(target=serve, args=(RankChannel(theirs), engine))
    rank.start()
    await connection.send(AddRequests((assignment("a", [1, 2, 3], ENDLESS),)))
    frame = await connection.receive()
    assert isinstance(frame, StepOutput)
    assert frame.stats.num_running == 1
    await connection.send(AbortRequests((RequestId("a"),)))
    while isinstance(frame, StepOutput) and (frame.outputs or frame.indices):
        frame = await connection.receive()  # steps from before the abort
    assert isinstance(frame, StepOutput)
    assert (frame.stats.num_running, frame.stats.kv_cache_usage) == (0, 0.0)
    await connection.send(Stop())
    rank.join()
    await connection.close()
