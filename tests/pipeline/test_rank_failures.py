"""Ranks that die or hang under load: noticed in time, replaced, and no answer is changed by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from tokenizers import Tokenizer, models

from forebay.broker_binary import find_broker
from pipeline.conftest import SCHEDULER, STUB, Services
from producer import Producer
from support.tiny_models import VOCAB_SIZE, make_tiny_model
from support.waiting import wait_until
from wire.ids import RequestId, TokenIds, token_ids
from wire.keys import Keys
from wire.messages import Prompt, Request
from wire.sampling import SamplingParams
from wire.scripts import FleetEntry, Scripts

# What is tested is not the server: one kind of it will do.
pytestmark = pytest.mark.parametrize("broker_binary", [find_broker()], indirect=True)

STEP_TIMEOUT_S = 1.0
AT_ONCE_S = 3.0
"""Some 30 ms when nothing else runs on the machine."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights, with a tokenizer for it."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_model("qwen2", directory)
    vocab = {f"t{token_id}": token_id for token_id in range(VOCAB_SIZE)}
    Tokenizer(models.WordLevel(vocab=vocab, unk_token="t0")).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    async with Redis.from_url(redis_url) as client:
        yield Scripts(client, Keys("forebay"))


class Victim:
    """A worker group whose ranks come to harm."""

    def __init__(
        self, services: Services, scripts: Scripts, process: subprocess.Popen[bytes]
    ) -> None:
        self._services = services
        self._scripts = scripts
        self._process = process

    def rank(self, number: int) -> psutil.Process:
        """The process that is rank `number` now."""
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.Error):
                command = child.cmdline()
                if command[command.index("--rank") + 1] == str(number):
                    return child
        raise AssertionError(f"there is no rank {number}")

    def events(self, name: str) -> list[dict[str, object]]:
        """The events of this name in the group's log."""
        lines = self._services.log(self._process).splitlines()
        logged = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in logged if event["event"] == name]

    async def entry(self) -> FleetEntry | None:
        """What the fleet knows of it, None while it is no member."""
        entries = (await self._scripts.fleet())[1]
        return entries[0] if entries else None

    async def is_busy(self) -> bool:
        entry = await self.entry()
        return entry is not None and entry.num_owned > 0

    async def harm(self, rank: int, how: signal.Signals, *, within_s: float) -> str:
        """Do something to a rank of the busy group; why the ranks were lost, as it says itself."""
        await eventually(self.is_busy)
        before, process = await self.entry(), self.rank(rank)
        num_losses = len(self.events("ranks lost"))
        started_s = time.monotonic()
        process.send_signal(how)
        await eventually(lambda: self._has_lost(before))
        assert time.monotonic() - started_s < within_s
        assert wait_until(lambda: len(self.events("ranks lost")) > num_losses)
        assert not process.is_running(), "nobody is left, a stopped rank included"
        return str(self.events("ranks lost")[-1]["reason"])

    async def _has_lost(self, before: FleetEntry | None) -> bool:
        now = await self.entry()
        assert before is not None
        return now is None or now.epoch > before.epoch


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.01)


def requests(name: str) -> list[Request]:
    """Greedy ones and ones that are drawn, by turns."""
    return [
        Request(
            RequestId(f"{name}-{index}"),
            Prompt(token_ids=token_ids([3 + index, 50 + index, 7])),
            SamplingParams(temperature=index % 2, seed=index, max_tokens=100, ignore_eos=True),
            stream=index < 4,
        )
        for index in range(16)
    ]


async def answers(producer: Producer, name: str) -> dict[str, TokenIds]:
    found = {}
    async for result in producer.submit_many(requests(name)):
        assert result.state == "done", result
        found[result.request_id.removeprefix(name)] = result.token_ids
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_whatever_happens_to_a_rank_the_answers_are_those_of_an_undisturbed_run(
    services: Services, scripts: Scripts, redis_url: str, tiny_model: Path
) -> None:
    services.start(*SCHEDULER, max_crashes=10)
    process = services.start(
        *("gpu_worker", "--model", str(tiny_model), "--tensor-parallel-size", "2"),
        threads=1,
        max_num_seqs=4,
        kv_cache_bytes="4MiB",
        step_timeout_s=STEP_TIMEOUT_S,
        max_crashes=10,
    )
    group = Victim(services, scripts, process)
    async with Producer(redis_url) as producer:
        undisturbed = await answers(producer, "undisturbed")
        disturbed = asyncio.create_task(answers(producer, "disturbed"))
        reason = await group.harm(1, signal.SIGKILL, within_s=AT_ONCE_S)
        assert reason.startswith("rank 1 (pid ")
        assert "was killed by SIGKILL" in reason
        reason = await group.harm(1, signal.SIGSTOP, within_s=STEP_TIMEOUT_S + AT_ONCE_S)
        assert "have not got on for 1 s" in reason
        assert await disturbed == undisturbed
    assert [event["num_restarts"] for event in group.events("ranks restarted")] == [1, 2]


async def test_the_same_goes_for_rank_0(
    services: Services, scripts: Scripts, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    group = Victim(services, scripts, services.start(*STUB, step_timeout_s=STEP_TIMEOUT_S))
    endless = SamplingParams(max_tokens=1900, min_tokens=1900, ignore_eos=True)
    async with Producer(redis_url) as producer:
        handles = [
            await producer.submit("on and on", sampling=endless, stream=True) for _ in range(64)
        ]
        streams = [asyncio.create_task(_collect(handle)) for handle in handles]
        reason = await group.harm(0, signal.SIGKILL, within_s=AT_ONCE_S)
        assert "rank 0" in reason
        await group.harm(0, signal.SIGSTOP, within_s=STEP_TIMEOUT_S + AT_ONCE_S)
        for text in await asyncio.gather(*streams):
            assert text == ("on and on" * 220)[:1900]


async def _collect(handle: object) -> str:
    return "".join([chunk.text async for chunk in handle])  # type: ignore[attr-defined]
