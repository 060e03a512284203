"""Who does not know the secret gets nothing, changes nothing, and says nothing that is believed."""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from cache.transfer.addresses import Address
from cache.transfer.connection import MAX_BODY_BYTES
from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed
from cache.transfer.handshake import NONCE_BYTES, PROTOCOL, RankName, greet, welcome
from cache.transfer.keys import MAC_BYTES, TransferKeys
from cache.transfer.messages import Refused, Released, RunAhead
from cache.transfer.stream import TimedStream
from cache.transfer.ticket import TicketOffice, read_ticket
from support.transfer_groups import EPOCH, EXPORTER, IMPORTER, KEYS, make_hashes
from support.transfer_sessions import NAME, Session, session
from wire.errors import ConfigError
from wire.ids import GroupId

OTHER_KEYS = TransferKeys.derive(bytes(32))
SLOTS = (4, 2)


def test_messages_arrive_in_both_directions_and_bulk_bytes_behind_them() -> None:
    with session() as ends:
        ends.client.send(Refused("one"))
        ends.client.send(Refused("two"))
        ends.server.send(RunAhead(b"digest"), [memoryview(b"bulk")])
        assert [ends.server.receive(), ends.server.receive()] == [Refused("one"), Refused("two")]
        assert ends.client.receive_only(RunAhead).digest == b"digest"
        assert ends.client.stream.receive(4) == b"bulk"


def test_keys_are_those_of_rfc_5869_and_are_not_printed() -> None:
    secret = bytes(range(32))
    expected = hmac.digest(secret, b"forebay transfer 1 ticket\x01", "sha256")
    assert TransferKeys.derive(secret).ticket == expected
    assert repr(KEYS) == "TransferKeys()"


# The handshake


@pytest.mark.parametrize(
    "meant",
    [
        RankName(EXPORTER, EPOCH, 1),
        RankName(EXPORTER, EPOCH + 1, 0),
        RankName(GroupId("other"), EPOCH, 0),
    ],
)
def test_a_client_does_not_talk_to_another_rank_than_it_meant(meant: RankName) -> None:
    with pytest.raises(TransferFailed, match="not the rank that was meant"), session(meant=meant):
        pass


def test_a_client_does_not_talk_to_a_server_with_another_secret() -> None:
    with pytest.raises(TransferFailed, match="another secret"), session(server_keys=OTHER_KEYS):
        pass


def welcoming(
    attack: Callable[[socket.socket], None], timeout_s: float = 5.0
) -> BaseException | None:
    """What a server says to a client that behaves like this."""
    attacker, served = socket.socketpair()
    with attacker, served, ThreadPoolExecutor(1) as pool:
        welcomed = pool.submit(welcome, TimedStream(served, Deadline(timeout_s)), KEYS, NAME)
        attack(attacker)
        return welcomed.exception()


def reflect(attacker: socket.socket) -> None:
    """Send the server's own nonce and proof back to it."""
    attacker.sendall(PROTOCOL + bytes(NONCE_BYTES))
    greeting = attacker.recv(NONCE_BYTES + MAC_BYTES, socket.MSG_WAITALL)
    attacker.sendall(greeting[NONCE_BYTES:])


def stop_early(attacker: socket.socket) -> None:
    attacker.sendall(PROTOCOL)
    attacker.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("attack", "failure"),
    [
        (lambda attacker: attacker.sendall(b"GET / HTTP/1.1".ljust(40)), "another protocol"),
        (reflect, "another secret"),
        (stop_early, "closed the connection"),
    ],
)
def test_a_server_serves_nobody_who_does_not_prove_the_secret(
    attack: Callable[[socket.socket], None], failure: str
) -> None:
    assert failure in str(welcoming(attack))


def test_a_server_does_not_wait_long_for_proof() -> None:
    failure = welcoming(lambda attacker: attacker.sendall(PROTOCOL), timeout_s=0.1)
    assert "not done after 0.1 s" in str(failure)


class RecordingStream(TimedStream):
    said = b""

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.said += b"".join(buffers)
        super().send(buffers)


def test_what_a_client_once_said_proves_nothing_later() -> None:
    client, served = socket.socketpair()
    with client, served, ThreadPoolExecutor(1) as pool:
        pool.submit(welcome, TimedStream(served, Deadline(1.0)), KEYS, NAME)
        stream = RecordingStream(client, Deadline(1.0))
        greet(stream, KEYS, NAME)
    assert len(stream.said) == len(PROTOCOL) + NONCE_BYTES + MAC_BYTES
    failure = welcoming(lambda attacker: attacker.sendall(stream.said))
    assert "another secret" in str(failure)


# Frames


def relay(ends: Session, change: Callable[[bytes], bytes]) -> None:
    """Let the client send a frame, and put something else in its place."""
    ends.client.send(Refused("no"))
    frame = ends.server_socket.recv(4096)
    ends.client_socket.sendall(change(frame))
    ends.client_socket.shutdown(socket.SHUT_WR)


def test_no_byte_of_a_frame_can_be_changed() -> None:
    with session() as ends:
        ends.client.send(Refused("no"))
        num_bytes = len(ends.server_socket.recv(4096))
    for i in range(num_bytes):
        with session() as ends:
            relay(ends, partial(flip, i))
            with pytest.raises(TransferFailed):
                ends.server.receive()


def flip(i: int, data: bytes) -> bytes:
    """`data` with a bit of its byte `i` changed."""
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


@pytest.mark.parametrize("kept_bytes", [0, 3, 7, 20])
def test_a_truncated_frame_is_no_frame(kept_bytes: int) -> None:
    with session() as ends:
        relay(ends, lambda frame: frame[:kept_bytes])
        with pytest.raises(TransferFailed, match="closed the connection"):
            ends.server.receive()


def test_a_frame_counts_once() -> None:
    with session() as ends:
        relay(ends, lambda frame: frame + frame)
        assert ends.server.receive() == Refused("no")
        with pytest.raises(TransferFailed, match="not what the other side sent"):
            ends.server.receive()


def test_a_frame_does_not_count_in_the_other_direction() -> None:
    with session() as ends:
        ends.client.send(Refused("no"))
        ends.server_socket.sendall(ends.server_socket.recv(4096))
        with pytest.raises(TransferFailed, match="not what the other side sent"):
            ends.client.receive()


def test_a_frame_of_another_session_does_not_count() -> None:
    with session() as ends:
        ends.client.send(Refused("no"))
        frame = ends.server_socket.recv(4096)
    with session() as ends:
        ends.client_socket.sendall(frame)
        with pytest.raises(TransferFailed, match="not what the other side sent"):
            ends.server.receive()


@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 1, 2**32 - 1])
def test_an_announcement_above_the_limit_ends_it_before_anything_is_reserved(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session() as ends:
        monkeypatch.setattr(ends.server.stream, "receive", only_small(ends.server.stream.receive))
        ends.client_socket.sendall(struct.pack(">IB", num_bytes, 3))
        with pytest.raises(TransferFailed, match=f"announces {num_bytes} bytes"):
            ends.server.receive()


def only_small(receive: Callable[[int], bytearray]) -> Callable[[int], bytearray]:
    def checked(num_bytes: int) -> bytearray:
        assert num_bytes <= MAC_BYTES
        return receive(num_bytes)

    return checked


def test_a_refusal_is_raised_where_something_else_is_expected() -> None:
    with session() as ends:
        ends.server.send(Refused("not today"))
        with pytest.raises(TransferFailed, match="not today"):
            ends.client.receive_only(Released)


def test_a_message_that_nobody_expects_ends_it() -> None:
    with session() as ends:
        ends.server.send(RunAhead(bytes(32)))
        with pytest.raises(TransferFailed, match="a RunAhead instead of Released"):
            ends.client.receive_only(Released)


def test_a_peer_that_takes_nothing_is_given_up() -> None:
    with session(timeout_s=0.1) as ends:
        endless = memoryview(bytes(64 * 1024 * 1024))
        with pytest.raises(TransferFailed, match=r"too slow|not done"):
            ends.server.send(RunAhead(bytes(32)), [endless])
        assert ends.server.stream.is_broken


def test_drops_do_not_stretch_the_time_limit() -> None:
    with session(timeout_s=0.1) as ends, ThreadPoolExecutor(1) as pool:
        started_s = time.monotonic()
        received = pool.submit(ends.server.stream.receive, 1000)
        while not received.done():
            ends.client_socket.sendall(b"x")
            time.sleep(0.01)
        assert isinstance(received.exception(), TransferFailed)
        assert time.monotonic() - started_s < 1.0


# Tickets


def write(office: TicketOffice, end_s: float = 100.0) -> bytes:
    return office.write(1, IMPORTER, SLOTS, make_hashes(len(SLOTS)), end_s)


def office_of(
    keys: TransferKeys = KEYS, group_id: GroupId = EXPORTER, epoch: int = EPOCH, now_s: float = 0.0
) -> TicketOffice:
    return TicketOffice(keys, group_id, epoch, lambda: now_s)


def test_every_rank_of_the_group_can_check_a_ticket() -> None:
    ticket = office_of().check(write(office_of()), IMPORTER)
    assert tuple(ticket.slots) == SLOTS
    assert ticket.hashes == make_hashes(len(SLOTS))


def test_no_byte_of_a_ticket_can_be_changed() -> None:
    ticket = write(office_of())
    for i in range(len(ticket)):
        with pytest.raises(TransferFailed, match="not genuine"):
            read_ticket(flip(i, ticket), KEYS)


@pytest.mark.parametrize("ticket", [b"", bytes(MAC_BYTES), bytes(200)])
def test_what_is_no_ticket_is_not_taken_for_one(ticket: bytes) -> None:
    with pytest.raises(TransferFailed, match="not genuine"):
        read_ticket(ticket, KEYS)


@pytest.mark.parametrize(
    "office",
    [office_of(OTHER_KEYS), office_of(group_id=GroupId("other")), office_of(epoch=EPOCH + 1)],
)
def test_a_ticket_of_another_fleet_group_or_epoch_is_refused(office: TicketOffice) -> None:
    with pytest.raises(TransferFailed):
        office_of().check(write(office), IMPORTER)


def test_a_ticket_is_the_importers_own() -> None:
    with pytest.raises(TransferFailed, match="another group"):
        office_of().check(write(office_of()), GroupId("thief"))


def test_a_ticket_ends() -> None:
    ticket = office_of().check(write(office_of(), end_s=50.0), IMPORTER)
    assert office_of(now_s=49.0).remaining_s(ticket) == 1.0
    with pytest.raises(TransferFailed, match="ended"):
        office_of(now_s=50.0).remaining_s(ticket)


# Addresses


@pytest.mark.parametrize("text", ["127.0.0.1:7001", "[::1]:7001", "unix:/run/x/0"])
def test_addresses_are_read_as_they_are_written(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:1",
        "127.0.0.1",
        "127.0.0.1:x",
        "0.0.0.0:0",
        "[::]:0",
        "1.2.3.4:65536",
        "unix:x",
    ],
)
def test_what_names_no_single_place_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(text)
