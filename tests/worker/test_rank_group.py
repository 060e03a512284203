"""Supervision of the ranks, with tiny processes in their place."""

from __future__ import annotations

import asyncio
import sys
import textwrap

import pytest

import gpu_worker.rank_group
from gpu_worker.rank_group import RankGroup, RankLost, open_ranks
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import AbortRequests, EngineStats, RankReady, StepOutput
from wire.errors import ModelError
from wire.ids import RequestId

OPTIONS = RankOptions(
    model_path="stub:",
    model_name="m",
    dtype="auto",
    block_size=16,
    kv_cache_bytes=None,
    max_model_len=None,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    num_threads=1,
    collective_timeout_s=5.0,
    log_level="info",
    log_format="json",
)
READY = RankReady(num_blocks=1, max_model_len=2, vocab_size=3, load_s=0.5)

PRELUDE = """
import os, signal, socket, sys, time
from gpu_worker.rank_protocol import *
rank, fd = int(sys.argv[1]), int(sys.argv[2])
if rank == 0:
    sock = socket.socket(fileno=fd)
    channel = RankChannel(sock)
ready = RankReady(num_blocks=1, max_model_len=2, vocab_size=3, load_s=0.5)
"""
SERVE = """
channel.send(ready)
while not any(isinstance(frame, Stop) for frame in channel.receive(wait=True)):
    channel.send(StepOutput((), EngineStats(num_running=1)))
"""


def ranks_that(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    """Have `behaviour` run in the place of each rank."""
    source = PRELUDE + textwrap.dedent(behaviour)

    def command(
        options: RankOptions, *, rank: int, size: int, rendezvous: str, socket_fd: int | None
    ) -> list[str]:
        return [
            sys.executable,
            "-c",
            source,
            str(rank),
            str(-1 if socket_fd is None else socket_fd),
        ]

    monkeypatch.setattr(gpu_worker.rank_group, "rank_command", command)


async def ended(group: RankGroup) -> str:
    """Receive until the group is lost; why it was."""

    async def receive_on() -> None:
        while True:
            await group.receive()

    with pytest.raises(RankLost) as caught:
        await asyncio.wait_for(receive_on(), 20)
    return str(caught.value)


async def test_frames_go_both_ways_and_all_ends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, SERVE)
    async with open_ranks(OPTIONS, 1) as group:
        assert await group.wait_ready(20) == READY
        await group.send(AbortRequests((RequestId("a"),)))
        assert await group.receive() == StepOutput((), EngineStats(num_running=1))


async def test_a_model_that_cannot_be_loaded_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks_that(monkeypatch, "channel.send(RankError('model_error', 'the file is torn'))")
    async with open_ranks(OPTIONS, 1) as group:
        with pytest.raises(ModelError, match="the file is torn"):
            await group.wait_ready(20)


async def test_any_other_error_of_a_rank_is_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, "channel.send(RankError('internal_error', 'out of memory'))")
    async with open_ranks(OPTIONS, 1) as group:
        with pytest.raises(RankLost, match="rank 0 failed: out of memory"):
            await group.wait_ready(20)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("sys.exit(3)", "exited with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("sock.sendall(b'x' * 64)", "sent what is no frame"),
        ("sock.sendall(bytes([0, 0, 0, 1, 16, 0xC1]))", "sent what is no frame"),
        ("channel.send(StepOutput((), EngineStats()))", "began with StepOutput instead"),
    ],
)
async def test_a_rank_that_dies_or_talks_nonsense_is_lost(
    monkeypatch: pytest.MonkeyPatch, behaviour: str, reason: str
) -> None:
    ranks_that(monkeypatch, behaviour)
    async with open_ranks(OPTIONS, 1) as group:
        with pytest.raises(RankLost, match=reason):
            await group.wait_ready(20)


async def test_a_rank_that_loads_for_too_long_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, "channel.receive(wait=True)")
    async with open_ranks(OPTIONS, 1) as group:
        with pytest.raises(RankLost, match=r"within 0\.1 s; raise FOREBAY_LOAD_TIMEOUT_S"):
            await group.wait_ready(0.1)


async def test_the_loss_of_another_rank_is_noticed_while_rank_0_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a collective, rank 0 would wait for it for ever."""
    behaviour = "channel.send(ready); time.sleep(60)"
    ranks_that(monkeypatch, f"if rank == 0: {behaviour}\nelse: sys.exit(4)")
    monkeypatch.setattr(gpu_worker.rank_group, "LAST_WORDS_S", 0.05)
    async with open_ranks(OPTIONS, 2) as group:
        assert "rank 1" in await ended(group)


async def test_ranks_that_hang_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither read what they are sent nor heed SIGTERM."""
    ranks_that(
        monkeypatch,
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 0:
            channel.send(ready)
        time.sleep(60)
        """,
    )
    monkeypatch.setattr(gpu_worker.rank_group, "STOP_TIMEOUT_S", 0.1)
    monkeypatch.setattr(gpu_worker.rank_group, "SEND_TIMEOUT_S", 0.1)
    async with open_ranks(OPTIONS, 2) as group:
        await group.wait_ready(20)
        many = AbortRequests((RequestId("x" * 100_000),) * 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.send(many), 0.1)
