"""What the directory costs: a group's end, its upkeep on the worker, memory in the server."""

from __future__ import annotations

import asyncio
import socket
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any, cast

from benchmarks.directory_fleet import Bench, random_hashes
from gpu_worker.directory_keeper import UPDATE_EVERY_S, DirectoryKeeper
from gpu_worker.membership import Membership
from gpu_worker.rank_protocol import CacheChanges, EngineStats, StepOutput, pack_frame
from wire.codec import decode, encode
from wire.ids import GroupId
from wire.scripts import ReclaimReason

GROUP = GroupId("group")
SETTLE_S = 0.5


class Prober(threading.Thread):
    """Another client, which pings the server over and over and notes how long it takes."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._path = url.removeprefix("unix://")
        self._ended = threading.Event()
        self.times_s: list[float] = []

    def run(self) -> None:
        """Ping until told to end."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self._path)
            while not self._ended.is_set():
                started_s = time.perf_counter()
                sock.sendall(b"PING\r\n")
                sock.recv(64)
                self.times_s.append(time.perf_counter() - started_s)
                time.sleep(0.0002)

    def end(self) -> list[float]:
        """How long the server took each time, in ms, sorted."""
        self._ended.set()
        self.join()
        return sorted(1000 * one for one in self.times_s)


async def measure_end(bench: Bench, *, num_blocks: int) -> list[dict[str, Any]]:
    """Each way in which a group's entry ends; and for comparison, deleting it while all wait."""
    reports = []
    # The server is to know the scripts: sending them is not what is measured.
    await _end(bench, await bench.join(GROUP), "leaving")
    for how in ("leaving", "crashed", "lapsed", "registering", "DEL instead"):
        await bench.client.flushdb()
        epoch = await bench.join(GROUP)
        await bench.fill(GROUP, epoch, random_hashes(num_blocks))
        if how == "lapsed":
            await bench.client.zadd(bench.keys.groups, {f"{GROUP}:{epoch}": 1}, xx=True)
        calm = await _probed(bench, asyncio.sleep(0))
        calls_before, us_before = await bench.script_us()
        busy = await _probed(bench, _end(bench, epoch, how))
        calls, us = await bench.script_us()
        assert not await bench.client.keys("*:cache*")
        reports.append(
            {
                "how": how,
                "num_blocks": num_blocks,
                "round_trips": calls - calls_before or 1,
                "client_ms": round(busy["call_ms"], 3),
                "server_ms": round((us - us_before) / 1000, 3) if calls > calls_before else None,
                "others_median_ms": round(busy["median_ms"], 3),
                "others_max_ms": round(busy["max_ms"], 3),
                "others_max_before_ms": round(calm["max_ms"], 3),
            }
        )
    return reports


async def _end(bench: Bench, epoch: int, how: str) -> None:
    if how == "registering":
        await bench.scripts.register(GROUP, model="m", card=b"")
    elif how == "DEL instead":
        await bench.client.delete(
            *(f"{bench.keys.prefix}:group:{GROUP}:{epoch}:cache{tier}" for tier in ("", ":device"))
        )
    else:
        await bench.scripts.reclaim(
            GROUP,
            epoch,
            how=cast("ReclaimReason", how),
            max_crashes=3,
            limit=500,
            result=b"",
        )


async def _probed(bench: Bench, call: Any) -> dict[str, float]:
    """How long a call took, and another client's questions around it."""
    prober = Prober(bench.url)
    prober.start()
    await asyncio.sleep(SETTLE_S)
    started_s = time.perf_counter()
    await call
    call_ms = 1000 * (time.perf_counter() - started_s)
    await asyncio.sleep(SETTLE_S)
    times_ms = await asyncio.to_thread(prober.end)
    return {"call_ms": call_ms, "median_ms": statistics.median(times_ms), "max_ms": times_ms[-1]}


@dataclass(frozen=True, slots=True)
class _Member:
    """As much of a Membership as the keeper looks at."""

    group_id: GroupId
    epoch: int
    is_member: bool = True


async def measure_upkeep(bench: Bench, *, num_steps: int, step_ms: float) -> list[dict[str, Any]]:
    """CPU time of the orchestrator: taking changes in, and writing them ten times a second."""
    reports = []
    for kind, num_new in (("decode, 64 sequences", 4), ("prefill, 1,024 tokens", 64)):
        await bench.client.flushdb()
        epoch = await bench.join(GROUP)
        member = cast("Membership", _Member(GROUP, epoch))
        keeper = DirectoryKeeper(bench.scripts, member, every_s=1e-6)
        keeper.joined()
        hashes = random_hashes(num_new * (num_steps + 1000))
        packed = [b"".join(hashes[i : i + num_new]) for i in range(0, len(hashes), num_new)]
        # The cache is full: for each block that comes one goes, at first to nowhere.
        keeper.note(CacheChanges(device=b"".join(packed[:1000])))
        stop = asyncio.Event()
        await keeper.keep(stop)
        steps = [CacheChanges(device=packed[1000 + i], gone=packed[i]) for i in range(num_steps)]
        frames = [encode(StepOutput((), EngineStats(), cache_changes=step)) for step in steps]
        empty = encode(StepOutput((), EngineStats()))
        steps_per_update = max(1, round(1000 * UPDATE_EVERY_S / step_ms))
        started_s = time.process_time()
        for frame in frames:
            decode(StepOutput, frame)
        framing_s = time.process_time() - started_s
        started_s = time.process_time()
        for _ in frames:
            decode(StepOutput, empty)
        framing_s -= time.process_time() - started_s
        started_s = time.process_time()
        for i, step in enumerate(steps, start=1):
            keeper.note(step)
            if i % steps_per_update == 0:
                await keeper.keep(stop)
        cpu_s = time.process_time() - started_s + max(0.0, framing_s)
        num_changes = 2 * num_new * num_steps
        reports.append(
            {
                "kind": kind,
                "changes_per_step": 2 * num_new,
                "steps_per_update": steps_per_update,
                "us_per_step": round(1e6 * cpu_s / num_steps, 1),
                "ms_per_1000_changes": round(1e6 * cpu_s / num_changes, 3),
                "step_ms": step_ms,
                "share_of_step": round(1000 * cpu_s / num_steps / step_ms, 5),
                "frame_bytes_per_step": len(
                    pack_frame(StepOutput((), EngineStats(), cache_changes=steps[0]))
                )
                - len(pack_frame(StepOutput((), EngineStats()))),
            }
        )
    return reports


async def measure_memory(bench: Bench, *, num_blocks: int) -> dict[str, Any]:
    """The server's memory for an entry, and how long it takes to write all of them."""
    await bench.client.flushdb()
    epoch = await bench.join(GROUP)
    hashes = random_hashes(num_blocks)
    before = await bench.memory_bytes()
    _, us_before = await bench.script_us()
    started_s = time.perf_counter()
    await bench.fill(GROUP, epoch, hashes)
    wall_s = time.perf_counter() - started_s
    _, us = await bench.script_us()
    return {
        "num_blocks": num_blocks,
        "bytes_per_block": round((await bench.memory_bytes() - before) / num_blocks, 1),
        "publish_s": round(wall_s, 2),
        "publish_server_s": round((us - us_before) / 1e6, 2),
        "server_us_per_block": round((us - us_before) / num_blocks, 3),
    }
