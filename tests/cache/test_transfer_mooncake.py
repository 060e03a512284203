"""Another transport behind the same seam: what arrives is checked, whoever else can write to it."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import ModuleType
from typing import ClassVar

import pytest
from structlog.testing import capture_logs

from cache.transfer.client import Lease
from cache.transfer.failures import TransferFailed
from cache.transfer.mooncake import MooncakeTransport
from cache.transfer.slots import BlockLayout
from support.transfer_groups import (
    LAYOUT,
    NUM_BLOCKS,
    SHARDS,
    block_of,
    empty_slots,
    exporting,
    fetch,
    import_on_all_ranks,
)
from wire.errors import ConfigError

PLACE = "127.0.0.1:7"
SEVERAL_RUNS = BlockLayout(4, 80_000, 200)


class FakeEngine:
    """Reads memory of this very process, as the engine reads that of another one."""

    spoils: ClassVar[bool] = False
    code: ClassVar[int] = 0

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        return 0 if protocol == "tcp" else -1

    def get_rpc_port(self) -> int:
        return 7

    def register_memory(self, address: int, num_bytes: int) -> int:
        return 0

    def transfer_sync_read(self, place: str, into: int, address: int, num_bytes: int) -> int:
        assert place == PLACE
        ctypes.memmove(into, address, num_bytes)
        if self.spoils:
            ctypes.memset(into, 1, 1)
        return self.code


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    module = ModuleType("mooncake.engine")
    module.TransferEngine = FakeEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    monkeypatch.setitem(sys.modules, "mooncake", ModuleType("mooncake"))
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    return FakeEngine


@pytest.fixture
def real_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    try:
        import_module("mooncake.engine")
    except ImportError as error:
        pytest.skip(f"Mooncake's transfer engine cannot be loaded here: {error}")


def make_transport(layout: BlockLayout = LAYOUT, num_windows: int = 4) -> MooncakeTransport:
    return MooncakeTransport(
        "127.0.0.1", layout.piece_bytes, protocol="tcp", num_windows=num_windows
    )


def round_trip(layout: BlockLayout) -> None:
    lending, borrowing = make_transport(layout), make_transport(layout)
    with exporting(SHARDS[2], layout=layout, transport=lending) as group:
        memories = import_on_all_ranks(
            group.borrow(), SHARDS[3], layout=layout, transport=borrowing
        )
    for heads, memory in zip(SHARDS[3], memories, strict=True):
        for block, stored in zip(group.pieces, memory, strict=True):
            assert stored.tobytes() == block_of(block, heads, layout)


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize("layout", [LAYOUT, SEVERAL_RUNS])
def test_blocks_arrive_through_windows(layout: BlockLayout) -> None:
    round_trip(layout)


@pytest.mark.usefixtures("real_engine")
def test_blocks_arrive_through_the_real_engine() -> None:
    round_trip(SEVERAL_RUNS)


def fetch_once(lease: Lease, transport: MooncakeTransport) -> bool:
    """Whether anything was put into the slots that nobody had checked."""
    into, memory = empty_slots(range(3))
    with pytest.raises(TransferFailed):
        fetch(lease, into, range(NUM_BLOCKS), transport=transport)
    return bool(memory.any())


def test_what_somebody_wrote_into_a_window_is_not_used(
    fake_engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = make_transport()
    with exporting(SHARDS[1], transport=transport) as group:
        lease = group.borrow()
        monkeypatch.setattr(fake_engine, "spoils", True)
        assert not fetch_once(lease, transport)
        monkeypatch.setattr(fake_engine, "spoils", False)
        monkeypatch.setattr(fake_engine, "code", -1)
        assert not fetch_once(lease, transport)


@pytest.mark.usefixtures("fake_engine")
def test_both_sides_must_have_chosen_it() -> None:
    with exporting(SHARDS[1]) as group, pytest.raises(TransferFailed, match="by socket only"):
        fetch(group.borrow(), empty_slots(range(3))[0], range(5), transport=make_transport())


@pytest.mark.usefixtures("fake_engine")
def test_more_requests_than_windows_wait_for_each_other() -> None:
    transport = make_transport(num_windows=1)
    with exporting(SHARDS[1], transport=transport) as group, ThreadPoolExecutor(4) as pool:
        lease = group.borrow()

        def fetch_blocks(_: int) -> bytes:
            into, memory = empty_slots(range(3))
            fetch(lease, into, range(NUM_BLOCKS), transport=transport)
            return bytes(memory[0])

        assert set(pool.map(fetch_blocks, range(8))) == {
            block_of(group.pieces[0], range(3), LAYOUT)
        }


@pytest.mark.usefixtures("fake_engine")
def test_choosing_it_is_warned_of() -> None:
    with capture_logs() as logs:
        make_transport()
    assert [(log["log_level"], log["place"]) for log in logs] == [("warning", PLACE)]
    assert "all_interfaces_without_authentication" in logs[0]["event"]


@pytest.mark.usefixtures("fake_engine")
def test_an_engine_that_does_not_start_is_an_error_of_configuration() -> None:
    with pytest.raises(ConfigError, match="does not start with rdma"):
        MooncakeTransport("127.0.0.1", 1)


def test_a_missing_package_is_an_error_of_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_transport()
