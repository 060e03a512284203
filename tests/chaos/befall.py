"""Carrying out the faults of a run, each at its time, and putting all right again afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from redis.exceptions import RedisError

from chaos.cast import Cast
from chaos.faults import Fault
from support.tcp_proxy import TcpProxy
from wire.client import connect
from wire.ids import RequestId
from wire.keys import Keys
from wire.records import TERMINAL_STATES

LOST_TAIL_S = 0.7
LOST_REPLIES = 0.25
SLOW_S = 0.08


@dataclass(slots=True)
class Casualty:
    """A worker group that was killed, on the monotonic clock, with the requests that it held.

    `taken_back_s` later they all had left it; `is_disturbed` if the server was away meanwhile.
    """

    at_s: float
    owned: Mapping[RequestId, bytes]
    taken_back_s: float | None = None
    is_disturbed: bool = False


class Fate:
    """What has befallen a cast so far."""

    def __init__(self, cast: Cast, keys: Keys) -> None:
        self._cast = cast
        self._keys = keys
        self._client: Any = connect(cast.server.url, timeout_s=1.0)
        self._watching: set[asyncio.Task[None]] = set()
        self.num_faults: Counter[str] = Counter()
        self.num_missed = 0
        self.casualties: list[Casualty] = []
        # What begins late may not be over when the next is due.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def close(self) -> None:
        """Watch no more."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._client.aclose()

    async def run(self, faults: Sequence[Fault], started_s: float) -> None:
        """Carry out all of them; when this returns, all are over."""
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                await asyncio.sleep(started_s + fault.at_s - time.monotonic())
                tasks.create_task(self._befall_in_turn(fault), name=str(fault))

    async def curse(self, request_id: RequestId) -> None:
        """Kill the rank of every group that computes this request, until it has ended."""
        key = self._keys.request(request_id)
        while True:
            state, owner = (
                value or b"" for value in await self._client.hmget(key, "state", "owner")
            )
            if state.decode() in TERMINAL_STATES:
                return
            group = owner.decode().rpartition(":")[0]
            if group and (rank := self._cast.services[group].rank()) is not None:
                self.num_faults["poison rank"] += 1
                rank.kill()
                while await self._client.hget(key, "owner") == owner:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)

    async def _befall_in_turn(self, fault: Fault) -> None:
        async with self._locks[fault.target]:
            await self._befall(fault)

    async def _befall(self, fault: Fault) -> None:
        kind, _, number = fault.target.partition("-")
        self.num_faults[f"{fault.action} {kind}"] += 1
        match fault.action, kind:
            case (("kill" | "lose tail" | "stop" | "flush scripts"), "server"):
                await self._befall_server(fault)
            case (("kill" | "stop"), "rank"):
                await self._befall_rank(fault, f"group-{number}")
            case (("kill" | "stop"), _):
                await self._befall_service(fault)
            case _:
                await _befall_line(fault, self._cast.proxies[fault.target])

    async def _befall_server(self, fault: Fault) -> None:
        server = self._cast.server
        if fault.action == "flush scripts":
            server.command("SCRIPT", "FLUSH")
        elif fault.action == "stop":
            server.stop()
            await asyncio.sleep(fault.for_s)
            server.cont()
        else:
            kept_bytes = server.aof_size()
            if fault.action == "lose tail":
                await asyncio.sleep(LOST_TAIL_S)
            server.kill()
            if fault.action == "lose tail":
                server.truncate_aof(server.aof_size() - kept_bytes)
            await asyncio.sleep(fault.for_s)
            server.restart()

    async def _befall_service(self, fault: Fault) -> None:
        service = self._cast.services[fault.target]
        if service.pid is None:
            self.num_missed += 1
        elif fault.action == "kill":
            service.is_held_down = True
            await self._kill(fault.target, service.kill)
            await asyncio.sleep(fault.for_s)
            service.is_held_down = False
        else:
            await _pause(psutil.Process(service.pid), fault.for_s)

    async def _befall_rank(self, fault: Fault, group: str) -> None:
        rank = self._cast.services[group].rank()
        if rank is None:
            self.num_missed += 1
            return
        if fault.action == "kill":
            await self._kill(group, rank.kill)
        else:
            await _pause(rank, fault.for_s)

    async def _kill(self, name: str, kill: Callable[[], None]) -> None:
        """Kill a service, or a group's rank, and have it watched what becomes of its requests."""
        owned = await self._owned(name)
        with contextlib.suppress(psutil.NoSuchProcess):  # somebody else was faster
            kill()
        if not owned:
            return
        casualty = Casualty(time.monotonic(), owned)
        self.casualties.append(casualty)
        watching = asyncio.create_task(self._watch(casualty), name=f"watch {name}")
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)

    async def _owned(self, group: str) -> dict[RequestId, bytes]:
        """The requests that a group holds, with the name of the life that holds them."""
        pattern, owned = f"{self._keys.prefix}:group:{group}:*:owned", {}
        try:
            async for key in self._client.scan_iter(pattern, count=1000):
                owner = b":".join(key.split(b":")[-3:-1])
                for request_id in await self._client.smembers(key):
                    owned[RequestId(request_id.decode())] = owner
        except RedisError:
            return {}  # the server is away too
        return owned

    async def _watch(self, casualty: Casualty) -> None:
        left = dict(casualty.owned)
        while left:
            try:
                for request_id, owner in list(left.items()):
                    now = await self._client.hget(self._keys.request(request_id), "owner")
                    if now != owner:
                        del left[request_id]
            except RedisError:
                casualty.is_disturbed = True
            await asyncio.sleep(0.05)
        casualty.taken_back_s = time.monotonic() - casualty.at_s


async def _pause(process: psutil.Process, for_s: float) -> None:
    process.suspend()
    await asyncio.sleep(for_s)
    with contextlib.suppress(psutil.NoSuchProcess):  # it was killed meanwhile
        process.resume()


async def _befall_line(fault: Fault, line: TcpProxy) -> None:
    match fault.action:
        case "cut":
            line.cut()
        case "lose replies":
            line.lose_replies(LOST_REPLIES)
        case "slow":
            line.delay_s = SLOW_S
        case "hold":
            line.hold()
        case "swallow":
            line.swallow()
    await asyncio.sleep(fault.for_s)
    if fault.for_s:
        line.heal()
