"""Groups with caches of blocks, a real directory between them, and all that can go wrong there."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import cast

from cache.directory import Holdings
from support.queue_driver import QueueDriver
from wire.ids import BlockHash, GroupId
from wire.scripts import DirectoryUpdate

Path = tuple[int, ...]
"""A prompt: what each of its blocks holds. A block's name covers the blocks before it."""


def block_hash(path: Path) -> BlockHash:
    return BlockHash(blake2b(bytes(path), digest_size=16).digest())


def chain(path: Path) -> list[BlockHash]:
    return [block_hash(path[: i + 1]) for i in range(len(path))]


@dataclass
class CachedBlocks:
    """A group's blocks by tier, closed under prefixes as the engine keeps them."""

    device: set[Path] = field(default_factory=set)
    host: set[Path] = field(default_factory=set)

    def length(self, path: Path) -> tuple[int, int]:
        """How many blocks of a prompt are on the device, and in all."""
        prefixes = [path[: i + 1] for i in range(len(path))]
        on_device = sum(prefix in self.device for prefix in prefixes)
        return on_device, sum(prefix in self.device | self.host for prefix in prefixes)

    def leaves(self, tier: set[Path]) -> list[Path]:
        """The blocks of a tier that no other one of it continues."""
        continued = {path[:-1] for path in tier}
        return sorted(path for path in tier if path not in continued)


class Group:
    """One group: its blocks, what it tells the directory, and under which epoch, if it lives."""

    def __init__(self, name: str) -> None:
        self.name = GroupId(name)
        self.epoch: int | None = None
        self.blocks = CachedBlocks()
        self.holdings = Holdings(max_changes=5, max_untold=20)

    def change(self, *, device: set[Path], host: set[Path]) -> None:
        """A step leaves the blocks like this."""
        before = self.blocks
        self.blocks = CachedBlocks(device, host)
        gone = (before.device | before.host) - device - host
        self.holdings.change(
            _packed(device - before.device), _packed(host - before.host), _packed(gone)
        )

    def compute(self, path: Path) -> None:
        """Have all blocks of a prompt on the device."""
        prefixes = {path[: i + 1] for i in range(len(path))}
        self.change(device=self.blocks.device | prefixes, host=self.blocks.host - prefixes)

    def evict(self, path: Path, *, to_host: bool) -> None:
        """Give up a block that no other one on the device continues, or keep it in host memory."""
        device, host = self.blocks.device - {path}, self.blocks.host
        if to_host or any(other[: len(path)] == path for other in host):
            host = host | {path}  # what continues it is there: it cannot go before that
        self.change(device=device, host=host)

    def drop(self, path: Path) -> None:
        """Give up a block in host memory that nothing continues."""
        self.change(device=self.blocks.device, host=self.blocks.host - {path})

    def die(self) -> None:
        """The ranks are lost, and all that they had cached."""
        self.epoch = None
        self.blocks = CachedBlocks()
        self.holdings = Holdings(max_changes=5, max_untold=20)


class DirectoryFleet:
    """Groups on one server; `sent` are the updates that were ever on their way, to come late."""

    def __init__(self, queue: QueueDriver, names: str) -> None:
        self.queue = queue
        self.groups = [Group(name) for name in names]
        self.sent: list[tuple[GroupId, int, DirectoryUpdate]] = []
        self.declared_dead: set[tuple[GroupId, int]] = set()
        self._saved: dict[bytes, tuple[int, bytes]] = {}

    async def join(self, group: Group) -> None:
        """Become a member, for the first time or again, with whatever is cached."""
        group.epoch = await self.queue.join(group.name)
        group.holdings.start_life()

    async def tell(self, group: Group, *, is_carried_out: bool, is_answered: bool) -> None:
        """Send the next update. Without an answer, the group will send it again.

        One that is answered and not carried out is one that the server has lost since.
        """
        update = group.holdings.next_update()
        if update is None:
            return
        assert group.epoch is not None
        self.sent.append((group.name, group.epoch, update))
        last = update.number
        if is_carried_out:
            call = self.queue.scripts.directory_update
            reply = await call(group.name, group.epoch, update)
            assert reply is not None, "it lives"
            last = reply
        if is_answered:
            group.holdings.answered(update, last)

    async def tell_all(self, group: Group) -> None:
        """Ask whether the directory knows everything; tell what it does not know."""
        update = group.holdings.next_update(ask=True)
        while update is not None:
            assert group.epoch is not None
            last = await self.queue.scripts.directory_update(group.name, group.epoch, update)
            assert last is not None
            group.holdings.answered(update, last)
            update = group.holdings.next_update()

    async def declare_dead(self, group: Group) -> None:
        """Its lease is over, and its requests are taken from it."""
        assert group.epoch is not None
        await self._declare_dead(group.name, group.epoch)

    async def bury(self) -> None:
        """Declare all dead whose lease is over, as schedulers do."""
        living = self.living()
        for member in await self._members():
            if member not in living:
                name, _, epoch = member.rpartition(":")
                await self._declare_dead(GroupId(name), int(epoch))

    async def _declare_dead(self, name: GroupId, epoch: int) -> None:
        await self.queue.kill(name, epoch)
        await self.queue.reclaim(name, epoch)
        self.declared_dead.add((name, epoch))

    async def arrive(self, name: GroupId, epoch: int, update: DirectoryUpdate) -> None:
        """An update comes once more, or only now: it may change something only in its turn."""
        state = f"{self.queue.keys.prefix}:group:{name}:{epoch}:cache"
        last, before = int(await self.queue.client.hget(state, "number") or 0), await self.entries()
        is_next = update.number == last + 1 or (update.reset and update.number > last)
        reply = await self.queue.scripts.directory_update(name, epoch, update)
        present = [group.epoch for group in self.groups if group.name == name and group.epoch]
        if present:
            assert (reply is not None) == (present == [epoch]), "the present life alone is heard"
        if (name, epoch) in self.declared_dead:
            assert reply is None
        if reply is None or not is_next:
            assert reply in (None, last)
            assert await self.entries() == before

    async def save(self) -> None:
        """The server writes its data to its disk."""
        keys = await self._keys("*")
        dumps = [await self.queue.client.dump(key) for key in keys]
        leases = [await self.queue.client.pttl(key) for key in keys]
        self._saved = {
            key: (lease, dump)
            for key, lease, dump in zip(keys, leases, dumps, strict=True)
            if dump is not None
        }

    async def rewind(self) -> None:
        """The server loses all since it was saved. Who does not live any more is not heard again.

        Groups that it does not know any more find out with their next heartbeat, and join again.
        """
        self.declared_dead.clear()
        await self.queue.client.flushall()
        for key, (lease_ms, dump) in self._saved.items():
            await self.queue.client.restore(key, lease_ms, dump)
        for member in await self._members():
            name, _, epoch = member.rpartition(":")
            await self.queue.kill(name, int(epoch))
        for group in self.groups:
            if group.epoch is not None:
                if await self.queue.beat(group.name, group.epoch) is None:
                    await self.join(group)
                else:
                    await self.tell_all(group)

    async def known(self) -> set[str]:
        """The groups of which the server knows anything cached, by group:epoch."""
        keys = await self._keys("*:cache*")
        return {":".join(key.decode().partition("}:group:")[2].split(":")[:2]) for key in keys}

    async def entries(self) -> dict[bytes, frozenset[bytes]]:
        """All sets of the directory, as the server has them."""
        sets = {
            key: cast("set[bytes]", await self.queue.client.smembers(key.decode()))
            for key in await self._keys("*:cache:*")
        }
        return {key: frozenset(blocks) for key, blocks in sets.items()}

    async def _keys(self, pattern: str) -> list[bytes]:
        return cast("list[bytes]", await self.queue.client.keys(pattern))

    async def _members(self) -> list[str]:
        members = await self.queue.client.zrange(self.queue.keys.groups, 0, -1)
        return [cast("bytes", member).decode() for member in members]

    async def query(self, *paths: Path) -> list[dict[str, tuple[int, int]]]:
        """For each prompt, by group:epoch, how much of it the directory says that it has."""
        packed = [b"".join(chain(path)) for path in paths]
        return [
            {key: (one.num_device_blocks, one.num_blocks) for key, one in answer.items()}
            for answer in await self.queue.scripts.directory_query(packed)
        ]

    def living(self) -> dict[str, Group]:
        """Groups by group:epoch."""
        return {f"{group.name}:{group.epoch}": group for group in self.groups if group.epoch}


def _packed(paths: set[Path]) -> bytes:
    return b"".join(block_hash(path) for path in paths)
