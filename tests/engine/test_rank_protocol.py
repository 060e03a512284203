from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest

from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import (
    MAX_FRAME_BYTES,
    AbortRequests,
    AddRequests,
    EngineStats,
    Frame,
    FromRank,
    RankChannel,
    RankConnection,
    RankError,
    RankReady,
    RawLogprob,
    SequenceOutput,
    StepOutput,
    Stop,
    ToRank,
    pack_frame,
)
from support.engine_fakes import assignment, rank_options
from wire.errors import ConfigError, WireError
from wire.ids import RequestId, token_ids
from wire.messages import ErrorInfo
from wire.sampling import SamplingParams

TO_RANK: list[ToRank] = [
    AddRequests(
        (
            assignment("a", range(1000), SamplingParams(stop=("x",), seed=-3)),
            assignment("b", [1], generated=[2**32 - 1], cache_salt=b"\x00salt"),
        )
    ),
    AddRequests(()),
    AbortRequests((RequestId("a"), RequestId("ü"))),
    Stop(),
]
FROM_RANK: list[FromRank] = [
    RankReady(num_blocks=10, max_model_len=20, vocab_size=30, load_s=0.25),
    StepOutput(
        (
            SequenceOutput(
                RequestId("a"),
                fence=2,
                token_ids=token_ids([7]),
                logprobs=(RawLogprob(7, -0.5, token_ids([7, 8]), (-0.5, -1.5)),),
                finish_reason="stop",
                stop_token_id=7,
                num_prompt_tokens=3,
                num_cached_tokens=2,
            ),
            SequenceOutput(RequestId("b"), fence=1, error=ErrorInfo("c", "m", "f")),
        ),
        EngineStats(num_running=1, num_blocks=4, num_free_blocks=1, step_s=0.5),
    ),
    RankError("model_error", "no such file"),
]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextlib.asynccontextmanager
async def connection(sock: socket.socket) -> AsyncIterator[RankConnection]:
    opened = await RankConnection.open(sock)
    try:
        yield opened
    finally:
        await opened.close()


def header(size_bytes: int, kind: int) -> bytes:
    return struct.pack(">IB", size_bytes, kind)


async def test_every_frame_arrives_as_it_was_sent(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    channel = RankChannel(theirs)
    async with connection(ours) as opened:
        for frame in TO_RANK:
            await opened.send(frame)
            assert channel.receive(wait=True) == [frame]
        for answer in FROM_RANK:
            channel.send(answer)
            assert await opened.receive() == answer


def test_polling_returns_what_is_there_and_does_not_wait(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    channel = RankChannel(theirs)
    assert channel.receive(wait=False) == []
    ours.sendall(b"".join(pack_frame(frame) for frame in TO_RANK))
    assert channel.receive(wait=False) == TO_RANK
    assert channel.receive(wait=False) == []


def test_a_frame_may_arrive_in_pieces(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    channel = RankChannel(theirs)
    packed = pack_frame(TO_RANK[0])
    for i in range(len(packed) - 1):
        ours.sendall(packed[i : i + 1])
        assert channel.receive(wait=False) == []
    ours.sendall(packed[-1:])
    assert channel.receive(wait=True) == [TO_RANK[0]]


def test_frames_before_the_end_of_the_connection_are_still_delivered(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    channel = RankChannel(theirs)
    ours.sendall(pack_frame(Stop()))
    ours.close()
    assert channel.receive(wait=True) == [Stop()]
    with pytest.raises(EOFError):
        channel.receive(wait=True)
    with pytest.raises(EOFError):
        channel.receive(wait=False)


HOSTILE = {
    "an unknown kind": header(0, 99),
    "a length beyond the limit": header(MAX_FRAME_BYTES + 1, 1),
    "not msgpack": header(1, 1) + b"\xc1",
    "not an array": header(1, 1) + b"\x01",
    "fields missing": header(2, 1) + b"\x91\x01",
    "plain text": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_rank_refuses_bytes_that_are_no_frame(
    sockets: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    ours, theirs = sockets
    ours.sendall(data)
    with pytest.raises(WireError):
        RankChannel(theirs).receive(wait=True)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
async def test_an_orchestrator_refuses_bytes_that_are_no_frame(
    sockets: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    ours, theirs = sockets
    async with connection(ours) as opened:
        theirs.sendall(data)
        with pytest.raises(WireError):
            await opened.receive()


@pytest.mark.parametrize("sent", [b"", header(10, 17)[:3], header(10, 17) + b"\x91"])
async def test_an_end_in_the_middle_of_a_frame_is_the_end_of_the_rank(
    sockets: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    ours, theirs = sockets
    async with connection(ours) as opened:
        theirs.sendall(sent)
        theirs.close()
        assert await asyncio.wait_for(opened.receive(), 5) is None


@pytest.mark.parametrize("frame", [TO_RANK[3], FROM_RANK[0]])
async def test_frames_in_the_wrong_direction_are_refused(
    sockets: tuple[socket.socket, socket.socket], frame: Frame
) -> None:
    ours, theirs = sockets
    if isinstance(frame, RankReady):
        ours.sendall(pack_frame(frame))
        with pytest.raises(WireError, match="no frame to a rank"):
            RankChannel(theirs).receive(wait=True)
        return
    async with connection(ours) as opened:
        theirs.sendall(pack_frame(frame))
        with pytest.raises(WireError, match="no frame from a rank"):
            await opened.receive()


def test_a_frame_above_the_limit_is_not_sent() -> None:
    too_long = assignment("a", [1], cache_salt=bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(WireError, match="exceeds"):
        pack_frame(AddRequests((too_long,)))


def test_options_survive_the_command_line() -> None:
    options = rank_options(num_blocks=7, stub_step_s=0.5)
    assert RankOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"no_such_option": 1}'])
def test_options_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        RankOptions.from_json(text)


def test_usage_is_the_share_of_blocks_that_are_held() -> None:
    assert EngineStats(num_blocks=4, num_free_blocks=1).kv_cache_usage == 0.75
    assert EngineStats().kv_cache_usage == 0.0
