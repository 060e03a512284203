"""Supervision of the ranks, with tiny processes in their place."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import pytest

import gpu_worker.rank_group
from gpu_worker.rank_group import RankGroup, RankLost, open_ranks
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import AbortRequests, EngineStats, RankReady, StepOutput
from support.fake_ranks import ranks_that
from wire.errors import ConfigError, ForebayError, ModelError
from wire.ids import RequestId

OPTIONS = RankOptions(
    model_path="stub:",
    model_name="m",
    quantization="none",
    kv_cache_dtype="auto",
    cpu_isa="auto",
    dtype="auto",
    block_size=16,
    kv_cache_bytes=None,
    host_cache_bytes=None,
    max_model_len=None,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    num_threads=1,
    collective_timeout_s=5.0,
    progress_interval_s=1.0,
    log_level="info",
    log_format="json",
)
READY = RankReady(num_blocks=1, max_model_len=2, vocab_size=3, load_s=0.5)

SERVE = """
channel.send(ready)
while not any(isinstance(frame, Stop) for frame in channel.receive(wait=True)):
    channel.send(StepOutput((), EngineStats(num_running=1)))
"""


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


@pytest.mark.parametrize("error", [ModelError, ConfigError])
async def test_what_no_other_start_can_mend_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch, error: type[ForebayError]
) -> None:
    ranks_that(monkeypatch, f"channel.send(RankError({error.code!r}, 'the file is torn'))")
    async with open_ranks(OPTIONS, 1) as group:
        with pytest.raises(error, match="the file is torn"):
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


async def test_the_loss_of_another_rank_is_noticed_at_once_while_rank_0_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a collective, rank 0 would wait for it for ever."""
    ranks_that(
        monkeypatch,
        """
        if rank == 0:
            channel.send(ready)
            time.sleep(60)
        elif rank == 1:
            time.sleep(60)
        """,
    )
    async with open_ranks(OPTIONS, 3) as group:
        await group.wait_ready(20)
        assert "rank 2" in await ended(group)


async def test_while_loading_rank_0_may_say_first_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks_that(
        monkeypatch,
        """
        if rank == 0:
            time.sleep(0.2)
            channel.send(RankError('model_error', 'the file is torn'))
        """,
    )
    async with open_ranks(OPTIONS, 2) as group:
        with pytest.raises(ModelError, match="the file is torn"):
            await group.wait_ready(20)


async def test_a_failed_collective_is_put_down_to_the_rank_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks_that(
        monkeypatch,
        """
        if rank == 0:
            channel.send(ready)
            channel.send(RankError('engine_failed', 'connection closed by peer'))
        else:
            time.sleep(0.3)  # noticed after what it has caused
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    monkeypatch.setattr(gpu_worker.rank_group, "NEIGHBOURS_EXIT_S", 10.0)
    async with open_ranks(OPTIONS, 2) as group:
        await group.wait_ready(20)
        reason = await ended(group)
    assert "rank 1" in reason
    assert "SIGKILL" in reason


async def test_after_an_error_nobody_waits_for_ranks_that_are_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks_that(
        monkeypatch,
        """
        if rank == 0:
            channel.send(ready)
        os.kill(os.getpid(), signal.SIGSTOP)
        """,
    )
    started_s = 0.0

    async def lose() -> None:
        nonlocal started_s
        async with open_ranks(OPTIONS, 2) as group:
            await group.wait_ready(20)
            started_s = time.monotonic()
            raise RankLost("for a test")

    with pytest.raises(RankLost, match="for a test"):
        await lose()
    assert time.monotonic() - started_s < 1.0


async def test_killed_ranks_are_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, SERVE)
    async with open_ranks(OPTIONS, 1) as group:
        await group.wait_ready(20)
        group.kill()
        await group.send(AbortRequests((RequestId("a"),)))


async def test_ranks_that_cannot_be_started_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(**options: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", no_room)
    with pytest.raises(RankLost, match=r"cannot be started: .*No space left"):
        async with open_ranks(OPTIONS, 1):
            pass


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


async def test_what_killed_groups_have_left_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    litter = tmp_path / "forebay-ranks-litter"
    litter.mkdir()
    os.utime(litter, (0, 0))
    async with open_ranks(OPTIONS, 1) as group:
        await group.wait_ready(30)
        assert not litter.exists()
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
