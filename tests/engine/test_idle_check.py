"""A rank checks its books when it has nothing else to do, and ends when they are wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gpu_worker.idle_check import IdleCheck
from gpu_worker.rank import _run, serve
from gpu_worker.rank_protocol import (
    _HEADER,
    AddRequests,
    FromRank,
    RankChannel,
    RankError,
    Stop,
    ToRank,
    _parse_header,
    pack_frame,
)
from support.engine_fakes import assignment, hashing_engine
from wire.codec import decode


def test_checks_take_a_small_share_of_the_time_however_long_they_are() -> None:
    now_s, checks = 0.0, []

    def check() -> None:
        nonlocal now_s
        checks.append(now_s)
        now_s += 0.5

    idle_check = IdleCheck(check, clock=lambda: now_s)
    for _ in range(1000):
        idle_check.run()
        now_s += 0.25
    assert checks[:3] == [0.0, 50.0, 100.0]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, RankChannel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, RankChannel(theirs)


def send(sock: socket.socket, *frames: ToRank) -> None:
    sock.sendall(b"".join(map(pack_frame, frames)))


def received(sock: socket.socket, channel: RankChannel) -> list[FromRank]:
    """All frames that the rank has sent."""
    channel._socket.shutdown(socket.SHUT_WR)
    data, frames = b"".join(iter(lambda: sock.recv(65536), b"")), list[FromRank]()
    while data:
        size_bytes, frame_type = _parse_header(data)
        end = _HEADER.size + size_bytes
        frame = decode(frame_type, data[_HEADER.size : end])
        assert isinstance(frame, FromRank)
        frames.append(frame)
        data = data[end:]
    return frames


def test_a_sound_engine_is_checked_when_it_becomes_idle_and_goes_on(
    sockets: tuple[socket.socket, RankChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, channel = sockets
    engine, _ = hashing_engine()
    check, is_idle = engine.check_integrity, []

    def checked() -> None:
        is_idle.append(not engine.has_work)
        check()
        send(ours, Stop())

    monkeypatch.setattr(engine, "check_integrity", checked)
    send(ours, AddRequests((assignment("r", [1, 2, 3]),)))
    serve(channel, engine)
    assert is_idle == [True]


def test_an_inconsistent_engine_ends_its_rank_with_an_error(
    sockets: tuple[socket.socket, RankChannel],
) -> None:
    ours, channel = sockets
    engine, _ = hashing_engine()
    engine.cache.grow(1)  # a block that nobody has
    send(ours, AddRequests((assignment("r", [1, 2, 3]),)))
    assert _run(lambda: serve(channel, engine), channel) == 1
    *_, last = received(ours, channel)
    assert isinstance(last, RankError)
    assert last.code == "engine_failed"
    assert "AssertionError" in last.message
