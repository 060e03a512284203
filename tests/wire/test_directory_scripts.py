"""The directory's two scripts, and what ends an entry, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import pytest

from cache.directory import split
from support.queue_driver import QueueDriver, open_queue
from wire.ids import GroupId
from wire.scripts import CachedPrefix, DirectoryUpdate

G = GroupId("g")


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    async with open_queue(redis_url) as driver:
        yield driver


def blocks(*numbers: int) -> bytes:
    """The hashes of blocks that only have numbers."""
    return b"".join(number.to_bytes(16, "little") for number in numbers)


CHAIN = blocks(*range(100))


async def tell(
    queue: QueueDriver,
    number: int,
    device: bytes = b"",
    host: bytes = b"",
    gone: bytes = b"",
    *,
    reset: bool = False,
    group: str = "g",
    epoch: int | None = None,
) -> int | None:
    epoch = await queue.epoch(group) if epoch is None else epoch
    update = DirectoryUpdate(number, reset, device, host, gone)
    return await queue.scripts.directory_update(GroupId(group), epoch, update)


async def ask(queue: QueueDriver, chain: bytes = CHAIN) -> dict[str, tuple[int, int]]:
    """Blocks on the device and in all, by group."""
    [answer] = await queue.scripts.directory_query([chain])
    return {
        key.partition(":")[0]: (found.num_device_blocks, found.num_blocks)
        for key, found in answer.items()
    }


# Queries


async def test_the_longest_prefix_of_each_group_is_found(queue: QueueDriver) -> None:
    for group in "ghij":
        await queue.join(group)
    await tell(queue, 1, blocks(*range(37)), group="g")
    await tell(queue, 1, blocks(*range(100)), group="h")
    await tell(queue, 1, blocks(*range(500, 600)), group="i")
    assert await ask(queue) == {"g": (37, 37), "h": (100, 100)}
    for length in range(100):
        expected = {name: (n, n) for name, n in (("g", min(37, length)), ("h", length)) if n}
        assert await ask(queue, CHAIN[: 16 * length]) == expected


async def test_a_prefix_may_go_on_in_host_memory(queue: QueueDriver) -> None:
    await queue.join("g")
    await queue.join("h")
    await tell(queue, 1, blocks(*range(10)), host=blocks(*range(10, 30)), group="g")
    await tell(queue, 1, host=blocks(*range(5)), group="h")
    assert await ask(queue) == {"g": (10, 30), "h": (0, 5)}


async def test_many_prompts_are_asked_for_at_once(queue: QueueDriver) -> None:
    epoch = await queue.join()
    await tell(queue, 1, blocks(*range(8), *range(200, 250)))
    chains = [CHAIN, blocks(*range(200, 260)), blocks(999), b""]
    key = f"g:{epoch}"
    assert await queue.scripts.directory_query(chains) == [
        {key: CachedPrefix(8, 8)},
        {key: CachedPrefix(50, 50)},
        {},
        {},
    ]
    assert await queue.scripts.directory_query([]) == []


# Updates


async def test_blocks_move_between_the_tiers_and_go(queue: QueueDriver) -> None:
    await queue.join()
    await tell(queue, 1, blocks(*range(6)))
    await tell(queue, 2, host=blocks(3, 4), gone=blocks(5))
    assert await ask(queue) == {"g": (3, 5)}
    await tell(queue, 3, blocks(3))
    assert await ask(queue) == {"g": (4, 5)}
    await tell(queue, 4, gone=blocks(3, 4))
    assert await ask(queue) == {"g": (3, 3)}


async def test_more_changes_than_a_command_takes_are_carried_out(queue: QueueDriver) -> None:
    await queue.join()
    many = blocks(*range(9001))
    await tell(queue, 1, many)
    assert await ask(queue, many) == {"g": (9001, 9001)}
    await tell(queue, 2, host=many)
    assert await ask(queue, many) == {"g": (0, 9001)}
    await tell(queue, 3, gone=many)
    assert await ask(queue, many) == {}


async def test_an_update_out_of_turn_changes_nothing(queue: QueueDriver) -> None:
    await queue.join()
    assert await tell(queue, 2, blocks(7)) == 0, "the first one is missing"
    assert await tell(queue, 1, blocks(0)) == 1
    assert await tell(queue, 1, blocks(0, 1)) == 1, "repeated"
    assert await tell(queue, 2, blocks(1)) == 2
    assert await tell(queue, 1, gone=blocks(0)) == 2, "late"
    assert await tell(queue, 4, blocks(2, 3)) == 2, "the third one is missing"
    assert await ask(queue) == {"g": (2, 2)}
    assert await tell(queue, 0) == 2, "only asked"


async def test_a_reset_begins_from_an_empty_entry_unless_it_is_late(queue: QueueDriver) -> None:
    await queue.join()
    await tell(queue, 1, blocks(*range(9)), host=blocks(9))
    assert await tell(queue, 5, blocks(0, 1), reset=True) == 5
    assert await ask(queue) == {"g": (2, 2)}
    assert await tell(queue, 5, reset=True) == 5
    assert await tell(queue, 3, reset=True) == 5
    assert await ask(queue) == {"g": (2, 2)}


# What ends an entry


async def test_a_group_whose_lease_is_over_is_not_named_and_comes_back_with_a_late_beat(
    queue: QueueDriver,
) -> None:
    epoch = await queue.join()
    await tell(queue, 1, CHAIN)
    await queue.kill()
    assert await ask(queue) == {}
    await queue.beat(epoch=epoch)
    assert await ask(queue) == {"g": (100, 100)}


@pytest.mark.parametrize("how", ["leaving", "crashed", "lapsed"])
async def test_a_group_s_end_takes_its_entry_along(queue: QueueDriver, how: str) -> None:
    epoch = await queue.join()
    await tell(queue, 1, CHAIN, host=blocks(200))
    await queue.kill()
    # While its requests are still being taken from it, in several calls, it is dead already.
    await queue.beat(epoch=epoch)
    await queue.submit("a", "b")
    await queue.assign("a", "b")
    await queue.kill()
    await queue.reclaim(how=how, limit=1)  # type: ignore[arg-type]
    assert not await queue.client.keys("*cache*")
    assert await tell(queue, 2, CHAIN) is None
    await queue.reclaim(how=how)  # type: ignore[arg-type]
    assert await tell(queue, 2, CHAIN) is None
    assert not await queue.client.keys("*cache*")


async def test_registering_again_takes_the_last_life_s_entry_along(queue: QueueDriver) -> None:
    first = await queue.join()
    await tell(queue, 1, CHAIN)
    second = await queue.scripts.register(G, model="m", card=b"")
    assert await ask(queue) == {}
    assert await tell(queue, 2, CHAIN, epoch=first) is None, "it lives, but is not the group"
    assert await tell(queue, 1, CHAIN, epoch=second) is None, "it does not live yet"
    await queue.beat(epoch=second, first=True)
    assert await tell(queue, 1, blocks(0), epoch=second) == 1
    assert await ask(queue) == {"g": (1, 1)}


async def test_an_entry_s_lease_is_renewed_by_updates_and_heartbeats(queue: QueueDriver) -> None:
    epoch = await queue.join()
    await tell(queue, 1, blocks(0), host=blocks(1))
    keys = cast("list[bytes]", await queue.client.keys("*:cache*"))
    assert len(keys) == 3

    async def shortest_ms() -> int:
        return min([int(await queue.client.pttl(key.decode())) for key in keys])

    async def nearly_over() -> None:
        for key in keys:
            await queue.client.pexpire(key.decode(), 5000)

    await nearly_over()
    await queue.beat(epoch=epoch)
    assert await shortest_ms() > 50_000
    await nearly_over()
    await tell(queue, 2, blocks(2))
    assert await shortest_ms() > 50_000


def test_hashes_in_a_row_come_apart() -> None:
    assert split(blocks(1, 2, 3)) == [blocks(1), blocks(2), blocks(3)]
    assert split(b"") == []
