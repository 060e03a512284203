"""Whatever goes wrong is one exception, in bounded time, and only what was checked is used."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import pytest

from cache.transfer.addresses import Address
from cache.transfer.client import Lease, borrow
from cache.transfer.connection import Connection
from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed
from cache.transfer.handshake import PROTOCOL, RankName, greet
from cache.transfer.keys import TransferKeys
from cache.transfer.lending import Loan
from cache.transfer.messages import LeaseRequest, RankSource
from cache.transfer.server import BlockServer, ServerLimits
from cache.transfer.slots import BlockLayout
from cache.transfer.stream import TimedStream
from cache.transfer.ticket import TicketOffice
from cache.transfer.transport import RunReceiver, RunSender, SocketTransport
from support.transfer_groups import (
    EPOCH,
    EXPORTER,
    IMPORTER,
    KEYS,
    LAYOUT,
    NUM_BLOCKS,
    SHARDS,
    ReadyLender,
    empty_slots,
    exporting,
    fetch,
    make_hashes,
)
from support.waiting import wait_until
from wire.errors import ConfigError
from wire.ids import GroupId

OTHER_KEYS = TransferKeys.derive(bytes(32))
QUICK = ServerLimits(num_threads=1, handshake_s=0.3, lend_s=0.1, send_s=5.0)
LARGE = BlockLayout(num_sides=2, element_bytes=1 << 20, scale_bytes=0)
"""A block is several runs, more than sockets hold."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither threads nor sockets."""
    process = psutil.Process()
    threads, sockets = set(threading.enumerate()), process.net_connections("all")
    yield
    assert set(threading.enumerate()) == threads
    assert len(process.net_connections("all")) == len(sockets)


def fetch_all(lease: Lease, layout: BlockLayout = LAYOUT, *, timeout_s: float = 5.0) -> None:
    num_blocks = lease.grant.num_blocks
    into, _ = empty_slots(range(3), layout, num_blocks)
    fetch(lease, into, range(num_blocks), timeout_s=timeout_s)


def with_ticket(lease: Lease, ticket: bytes) -> Lease:
    return dataclasses.replace(lease, grant=dataclasses.replace(lease.grant, ticket=ticket))


def with_ranks(lease: Lease, *ranks: RankSource) -> Lease:
    return dataclasses.replace(lease, grant=dataclasses.replace(lease.grant, ranks=ranks))


def lease_from(address: str) -> Lease:
    """A lease that names a rank which may not exist."""
    with exporting(SHARDS[1]) as group:
        return with_ranks(group.borrow(), RankSource(address, 0, 3))


# Exporters that misbehave


class SpoilingTransport(SocketTransport):
    """Sends `num_good` runs as they are, and then what `spoil` makes of the next."""

    def __init__(self, num_good: int) -> None:
        self._num_good = num_good

    def sending(self, connection: Connection) -> AbstractContextManager[RunSender]:
        return nullcontext(self.Runs(self, connection))

    def spoil(self, connection: Connection, digest: bytes, parts: Sequence[memoryview]) -> None:
        raise NotImplementedError

    class Runs:
        def __init__(self, transport: SpoilingTransport, connection: Connection) -> None:
            self._transport = transport
            self._connection = connection
            self._plain = SocketTransport().sending(connection)
            self._num_sent = 0

        def send(self, digest: bytes, parts: Sequence[memoryview]) -> None:
            self._num_sent += 1
            if self._num_sent > self._transport._num_good:
                self._transport.spoil(self._connection, digest, parts)
                return
            with self._plain as sender:
                sender.send(digest, parts)


class FlippingTransport(SpoilingTransport):
    def spoil(self, connection: Connection, digest: bytes, parts: Sequence[memoryview]) -> None:
        parts[-1][-1] ^= 1
        with SocketTransport().sending(connection) as sender:
            sender.send(digest, parts)


class DyingTransport(SpoilingTransport):
    def spoil(self, connection: Connection, digest: bytes, parts: Sequence[memoryview]) -> None:
        with SocketTransport().sending(connection) as sender:
            sender.send(digest, [parts[0][:-1]])
        connection.stream.is_broken = True  # so that not even a refusal is sent
        raise TransferFailed("about to die")


class HangingTransport(SpoilingTransport):
    def __init__(self, num_good: int) -> None:
        super().__init__(num_good)
        self.go_on = threading.Event()

    def spoil(self, connection: Connection, digest: bytes, parts: Sequence[memoryview]) -> None:
        self.go_on.wait(5.0)


@pytest.mark.parametrize("num_good", [0, 2])
def test_a_flipped_bit_is_found_before_the_blocks_are_used(num_good: int) -> None:
    with exporting(SHARDS[1], transport=FlippingTransport(num_good)) as group:
        into, memory = empty_slots(range(3))
        with pytest.raises(TransferFailed, match="not what the exporter's digest says"):
            fetch(group.borrow(), into, range(NUM_BLOCKS))
    if num_good == 0:
        assert not memory.any()


def test_an_exporter_that_dies_half_way_fails_the_fetch() -> None:
    with (
        exporting(SHARDS[1], transport=DyingTransport(1)) as group,
        pytest.raises(TransferFailed, match="closed the connection"),
    ):
        fetch_all(group.borrow())


def test_an_exporter_that_hangs_half_way_costs_the_time_limit_and_no_more() -> None:
    transport = HangingTransport(1)
    with exporting(SHARDS[1], transport=transport) as group:
        lease = group.borrow()
        started_s = time.monotonic()
        with pytest.raises(TransferFailed, match=r"too slow|not done"):
            fetch_all(lease, timeout_s=0.1)
        assert time.monotonic() - started_s < 1.0
        transport.go_on.set()


def test_one_rank_that_fails_ends_the_fetch_from_the_others() -> None:
    transport = HangingTransport(0)
    with exporting(SHARDS[3], transport=transport) as group:
        lease = group.borrow()
        *hanging, last = lease.grant.ranks
        lease = with_ranks(lease, *hanging, dataclasses.replace(last, address="127.0.0.1:1"))
        started_s = time.monotonic()
        with pytest.raises(TransferFailed, match=r"rank 2 of lender at 127.0.0.1:1"):
            fetch_all(lease)
        assert time.monotonic() - started_s < 2.0
        transport.go_on.set()


def test_an_address_where_nobody_listens_fails_the_fetch(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", f"unix:{tmp_path}/none", "nowhere"):
        with pytest.raises(TransferFailed, match=r"cannot be reached|not an address"):
            fetch_all(lease_from(address))


def test_a_listener_that_says_nothing_costs_the_time_limit_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lease = lease_from(f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(TransferFailed, match=r"too slow|not done"):
            fetch_all(lease, timeout_s=0.1)


def test_a_listener_that_is_somebody_else_fails_the_fetch() -> None:
    with exporting(SHARDS[1]) as group, pytest.raises(TransferFailed, match="was meant"):
        fetch_all(dataclasses.replace(group.borrow(), epoch=EPOCH - 1))


# Importers that misbehave


def test_an_importer_with_another_secret_gets_nothing() -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        into, memory = empty_slots(range(3))
        with pytest.raises(TransferFailed, match="another secret"):
            fetch(lease, into, range(NUM_BLOCKS), keys=OTHER_KEYS)
    assert not memory.any()


def test_a_client_that_says_nothing_does_not_keep_its_place() -> None:
    with exporting(SHARDS[1], limits=QUICK) as group:
        host, _, port = group.servers[0].address.rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.sendall(PROTOCOL)
            fetch_all(group.borrow())  # there is one thread, which the silent one has now


@pytest.mark.parametrize(
    ("send_s", "valid_s"), [(0.1, 30.0), (30.0, 0.3)], ids=["time to send", "end of the ticket"]
)
def test_a_client_that_takes_nothing_does_not_keep_its_place(send_s: float, valid_s: float) -> None:
    limits = dataclasses.replace(QUICK, send_s=send_s)
    is_stalling, enough = threading.Event(), threading.Event()

    class StallingTransport(SocketTransport):
        def receiving(self, connection: Connection) -> AbstractContextManager[RunReceiver]:
            return nullcontext(Stalling())

    class Stalling:
        def receive_into(self, memory: memoryview) -> bytes:
            is_stalling.set()
            enough.wait(5.0)
            raise TransferFailed("enough")

    with exporting(SHARDS[1], layout=LARGE, num_blocks=4, limits=limits) as group:
        group.lender.valid_s = valid_s
        lease = group.borrow()
        with ThreadPoolExecutor(1) as pool:
            into, _ = empty_slots(range(3), LARGE)
            stalling = pool.submit(fetch, lease, into, range(4), transport=StallingTransport())
            assert is_stalling.wait(5.0)
            started_s = time.monotonic()
            group.borrow()  # from the one thread that there is
            assert time.monotonic() - started_s < 2.0
            enough.set()
            assert "enough" in str(stalling.exception())


def test_a_ticket_for_other_slots_is_refused() -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        forged = TicketOffice(OTHER_KEYS, EXPORTER, EPOCH).write(
            11, IMPORTER, range(NUM_BLOCKS), make_hashes(), time.monotonic() + 60
        )
        with pytest.raises(TransferFailed, match="not genuine"):
            fetch_all(with_ticket(lease, forged))


@pytest.mark.parametrize(
    ("importer", "epoch", "valid_s", "refusal"),
    [
        (IMPORTER, EPOCH, -1.0, "has ended"),
        (IMPORTER, EPOCH - 1, 60.0, "another epoch"),
        (GroupId("other"), EPOCH, 60.0, "given to another group"),
    ],
)
def test_a_ticket_that_does_not_hold_here_and_now_is_refused(
    importer: GroupId, epoch: int, valid_s: float, refusal: str
) -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        ticket = TicketOffice(KEYS, EXPORTER, epoch).write(
            11, importer, range(NUM_BLOCKS), make_hashes(), time.monotonic() + valid_s
        )
        with pytest.raises(TransferFailed, match=refusal):
            fetch_all(with_ticket(lease, ticket))


def test_what_was_copied_after_the_end_of_the_ticket_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        slots = group.servers[0]._slots
        read = slots.read

        def read_late(*arguments: object) -> object:
            """The ticket ends while the pieces are copied."""
            monkeypatch.setattr(group.servers[0]._tickets, "_clock", lambda: float("inf"))
            return read(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(slots, "read", read_late)
        into, memory = empty_slots(range(3))
        with pytest.raises(TransferFailed, match="has ended"):
            fetch(lease, into, range(NUM_BLOCKS))
    assert not memory.any()


def test_requests_that_do_not_fit_the_exporter_are_refused() -> None:
    with exporting(SHARDS[3]) as group:
        lease = group.borrow()
        first = lease.grant.ranks[0]
        everything = dataclasses.replace(first, num_heads=3)
        with pytest.raises(TransferFailed, match="no other heads"):
            fetch_all(with_ranks(lease, everything))
        with pytest.raises(TransferFailed, match="a head piece has 408 bytes here"):
            fetch_all(with_ranks(lease, everything), BlockLayout(4, 90, 6))
        with pytest.raises(TransferFailed, match="no rank of the exporter holds"):
            fetch_all(with_ranks(lease, first))


def test_a_ticket_for_slots_that_are_not_there_is_refused() -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        ticket = TicketOffice(KEYS, EXPORTER, EPOCH).write(
            11, IMPORTER, (0, 1, 2, 3, 99), make_hashes(), time.monotonic() + 60
        )
        with pytest.raises(TransferFailed, match="slots that are not there"):
            fetch_all(with_ticket(lease, ticket))


def test_a_head_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with exporting(SHARDS[1]) as group:
        lease = group.borrow()
        monkeypatch.setattr("cache.transfer.client.divide_heads", lambda *_: {0: [1, 1]})
        with pytest.raises(TransferFailed, match="asked for twice"):
            fetch_all(lease)


def test_more_bytes_than_allowed_are_not_asked_for() -> None:
    with exporting(SHARDS[1]) as group:
        into, _ = empty_slots(range(3))
        with pytest.raises(TransferFailed, match="at most 1000 are allowed"):
            fetch(group.borrow(), into, range(NUM_BLOCKS), max_bytes=1000)


# The engine behind the server


class LateLender(ReadyLender):
    """Answers when the test says so."""

    def __init__(self) -> None:
        super().__init__((1,))
        self.asked: list[Future[Loan | None]] = []

    def lend(self, request: LeaseRequest) -> Future[Loan | None]:
        self.asked.append(Future())
        return self.asked[-1]


def serve(lender: ReadyLender | None, limits: ServerLimits | None = None) -> BlockServer:
    into, _ = empty_slots(range(3))
    return BlockServer(RankName(EXPORTER, EPOCH, 0), into, KEYS, lender=lender, limits=limits)


def borrow_from(server: BlockServer) -> Lease:
    request = LeaseRequest(IMPORTER, "format", make_hashes())
    return borrow(server.address, EXPORTER, EPOCH, request, KEYS, timeout_s=5.0)


def test_an_engine_that_has_nothing_to_lend_says_so() -> None:
    lender = LateLender()
    with serve(lender) as server, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(borrow_from, server)
        assert wait_until(lambda: bool(lender.asked))
        lender.asked[0].set_result(None)
        with pytest.raises(TransferFailed, match="none of these blocks"):
            asking.result()


def test_an_engine_that_is_asked_in_vain_finds_the_question_withdrawn() -> None:
    lender = LateLender()
    with serve(lender, QUICK) as server:
        with pytest.raises(TransferFailed, match="no time to answer"):
            borrow_from(server)
        assert not lender.asked[0].set_running_or_notify_cancel()


def test_only_half_of_the_threads_wait_for_the_engine() -> None:
    lender = LateLender()
    with serve(lender, ServerLimits(num_threads=2)) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(borrow_from, server)
        assert wait_until(lambda: len(lender.asked) == 1)
        with pytest.raises(TransferFailed, match="too many others"):
            borrow_from(server)
        lender.asked[0].set_result(None)
        assert isinstance(waiting.exception(), TransferFailed)


def test_a_loan_that_nobody_takes_is_released() -> None:
    lender = LateLender()
    with serve(lender) as server:
        deadline = Deadline(5.0)
        with Address.parse(server.address).connect(deadline) as peer:
            stream = TimedStream(peer, deadline)
            asking = Connection(stream, greet(stream, KEYS, RankName(EXPORTER, EPOCH, 0)))
            asking.send(LeaseRequest(IMPORTER, "format", make_hashes()))
            assert wait_until(lambda: bool(lender.asked))
        # What is sent to one who has hung up may go out once: more than that fits is needed.
        far = RankSource("x" * 900_000, 0, 3)
        lender.asked[0].set_result(Loan(5, (1,), time.monotonic() + 60, (far,)))
        assert wait_until(lambda: lender.released == [5])


def test_rank_0_is_the_one_to_ask() -> None:
    with serve(None) as server, pytest.raises(TransferFailed, match="rank 0"):
        borrow_from(server)


def test_a_lease_for_other_blocks_than_asked_for_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with exporting(SHARDS[1]) as group:
        office = TicketOffice(KEYS, EXPORTER, EPOCH)
        monkeypatch.setattr(
            group.servers[0]._tickets,
            "write",
            lambda *a: office.write(11, IMPORTER, a[2], bytes(len(a[3])), a[4]),
        )
        with pytest.raises(TransferFailed, match="other blocks"):
            group.borrow()


# The end


def test_a_server_ends_at_once_whatever_its_clients_do() -> None:
    lender = LateLender()
    with ThreadPoolExecutor(1) as pool, serve(lender, ServerLimits(num_threads=3)) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port))):
            asking = pool.submit(borrow_from, server)
            assert wait_until(lambda: len(lender.asked) == 1)
            started_s = time.monotonic()
            server.close()
            assert time.monotonic() - started_s < 1.0
        assert isinstance(asking.exception(), TransferFailed)


def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "0"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    with exporting(SHARDS[1], addresses=[f"unix:{path}"]) as group:
        fetch_all(group.borrow())
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="in use"),
        exporting(SHARDS[1], addresses=[f"unix:{path.parent}/file"]),
    ):
        pass


def test_a_server_does_not_listen_everywhere() -> None:
    with (
        pytest.raises(ConfigError, match="name one interface"),
        exporting(SHARDS[1], addresses=["0.0.0.0:0"]),
    ):
        pass
