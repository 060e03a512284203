"""Blocks arrive as they are stored, between groups of any two tensor-parallel sizes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cache.transfer.client import give_back
from cache.transfer.slots import BlockLayout
from support.transfer_groups import (
    IMPORTER,
    KEYS,
    LAYOUT,
    NUM_BLOCKS,
    SHARDS,
    TIMEOUT_S,
    block_of,
    empty_slots,
    exporting,
    fetch,
    import_on_all_ranks,
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither threads nor sockets."""
    process = psutil.Process()
    threads, sockets = set(threading.enumerate()), process.net_connections("all")
    yield
    assert set(threading.enumerate()) == threads
    assert len(process.net_connections("all")) == len(sockets)


@pytest.mark.parametrize("exporter", SHARDS)
@pytest.mark.parametrize("importer", SHARDS)
def test_blocks_arrive_whatever_the_tensor_parallel_sizes(exporter: int, importer: int) -> None:
    with exporting(SHARDS[exporter]) as group:
        memories = import_on_all_ranks(group.borrow(), SHARDS[importer])
    for heads, memory in zip(SHARDS[importer], memories, strict=True):
        for block, stored in zip(group.pieces, memory, strict=True):
            assert stored.tobytes() == block_of(block, heads, LAYOUT)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(BlockLayout(4, 128, 0), id="no scales"),
        # Four blocks a run, so that runs end within a head; and a last run of one block.
        pytest.param(BlockLayout(4, 60_000, 200), id="several runs"),
        pytest.param(BlockLayout(2, 550_000, 0), id="a piece above the size of a run"),
    ],
)
def test_any_size_of_piece_arrives(layout: BlockLayout) -> None:
    with exporting(SHARDS[2], layout=layout, num_blocks=5) as group:
        (memory,) = import_on_all_ranks(group.borrow(), SHARDS[1], layout=layout)
    for block, stored in zip(group.pieces, memory, strict=True):
        assert stored.tobytes() == block_of(block, SHARDS[1][0], layout)


def test_blocks_travel_over_unix_sockets_which_nobody_else_may_use(tmp_path: Path) -> None:
    paths = [tmp_path / str(rank) for rank in range(2)]
    with exporting(SHARDS[2], addresses=[f"unix:{path}" for path in paths]) as group:
        assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
        import_on_all_ranks(group.borrow(), SHARDS[1])
    assert not any(path.exists() for path in paths)


def test_fewer_blocks_than_asked_for_may_be_lent() -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow(num_blocks=NUM_BLOCKS + 2)
        assert lease.grant.num_blocks == NUM_BLOCKS
        shorter = group.borrow(num_blocks=2)
        assert shorter.grant.num_blocks == 2
        import_on_all_ranks(shorter, SHARDS[1])


def test_a_lease_is_given_back_by_name() -> None:
    with exporting(SHARDS[2]) as group:
        lease = group.borrow()
        give_back(lease, IMPORTER, KEYS, timeout_s=TIMEOUT_S)
        assert group.lender.released == [11]


def test_many_clients_are_served_one_after_the_other() -> None:
    with exporting(SHARDS[2]) as group:
        lease = group.borrow()

        def fetch_once(_: int) -> bytes:
            into, memory = empty_slots(range(3))
            fetch(lease, into, range(NUM_BLOCKS))
            return bytes(memory[0])

        with ThreadPoolExecutor(24) as pool:
            firsts = set(pool.map(fetch_once, range(48)))
    assert firsts == {block_of(group.pieces[0], range(3), LAYOUT)}


def test_a_report_says_how_much_came() -> None:
    with exporting(SHARDS[1]) as group:
        into, _ = empty_slots(range(1, 3))
        report = fetch(group.borrow(), into, range(NUM_BLOCKS))
    assert report.num_bytes == NUM_BLOCKS * 2 * LAYOUT.piece_bytes
    assert report.seconds > 0
