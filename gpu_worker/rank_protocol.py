"""What a group's orchestrator and its rank 0 say to each other, and how it is framed.

They share a stream socket pair, inherited by rank 0. A frame is

    length of the payload: uint32, big-endian | kind: uint8 | payload: msgpack, see `wire.codec`

    to rank 0      AddRequests, AbortRequests, Stop
    from rank 0    RankReady (once, first), then StepOutput after each step, StepProgress during a
                   long one; or RankError, last

Either side's end of file means that the other one is gone: the rank exits, the orchestrator
ends all ranks. Ranks above 0 have no socket; they hear from rank 0 alone.

`RankChannel` is the rank's blocking side and `RankConnection` the orchestrator's asyncio side.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TypeAlias

from wire.codec import decode, encode
from wire.errors import WireError
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import Assignment, ErrorInfo, FinishReason

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Above this a length is taken for garbage. Some 16 million token ids: far above any batch."""


# To rank 0


@dataclass(frozen=True, slots=True)
class AddRequests:
    """Run these. One whose id is already running replaces it if its fence is higher."""

    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """Forget these, free their blocks, say nothing more of them. Unknown ids are ignored."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Exit with status 0 now, whatever is running."""


# From rank 0


@dataclass(frozen=True, slots=True)
class RankReady:
    """The group has loaded its model and takes requests.

    `cache_format` names all that changes a cached block's bytes: the model's weights, how they are
    computed with, the format of the pages; not the tensor-parallel size.
    """

    num_blocks: int
    max_model_len: int
    vocab_size: int
    load_s: float
    cache_format: str = ""


@dataclass(frozen=True, slots=True)
class RawLogprob:
    """The chosen token's log probability and those of the most likely ones, best first."""

    token_id: int
    logprob: float
    top_token_ids: TokenIds = field(default_factory=token_ids)
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step gave one sequence.

    `token_ids` are the new ones of this step, a final end-of-sequence or stop token included;
    `logprobs`, if asked for, has one entry for each. Exactly one of `finish_reason` and `error` is
    set in a sequence's last output, none before. `stop_token_id` is the end-of-sequence or stop
    token that ended it. `index` is set in a sequence's first output: the number by which the
    columns of later steps name it, used only once in a rank's life.
    """

    request_id: RequestId
    fence: int
    token_ids: TokenIds = field(default_factory=token_ids)
    logprobs: tuple[RawLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    index: int | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine after a step; `num_*_total` count since it started.

    `step_s` is the wall time of the step, `num_step_tokens` the tokens that it ran the model on.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_step_tokens: int = 0
    step_s: float = 0.0
    num_prefill_tokens_total: int = 0
    num_cached_tokens_total: int = 0
    num_generated_tokens_total: int = 0
    num_preemptions_total: int = 0

    @property
    def kv_cache_usage(self) -> float:
        """The share of the blocks that running sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What a step changed in the cache of blocks, net: hashes of 16 bytes each, in a row.

    `device` are in the device's memory now, `host` in host memory alone, `gone` in neither; a hash
    is in at most one of them. What is held is closed under prefixes, and so is what is held on the
    device.
    """

    device: bytes = b""
    host: bytes = b""
    gone: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.device or self.host or self.gone)


NO_CHANGES = CacheChanges()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The outputs of one step, and how the engine stands after it.

    Most of what a step gives is one token for each of many sequences, and that comes in columns:
    the sequence with the number `indices[i]` got the token `token_ids[i]`, and goes on. All else
    comes in `outputs`: a sequence's first and last output, and each one with log probabilities.
    """

    outputs: tuple[SequenceOutput, ...]
    stats: EngineStats
    indices: TokenIds = field(default_factory=token_ids)
    token_ids: TokenIds = field(default_factory=token_ids)
    cache_changes: CacheChanges = NO_CHANGES

    def __post_init__(self) -> None:
        """Raise WireError for columns that do not match."""
        if len(self.indices) != len(self.token_ids):
            raise WireError(f"{len(self.token_ids)} tokens for {len(self.indices)} sequences")


@dataclass(frozen=True, slots=True)
class StepProgress:
    """A step that is still running has got further; `num_layers` counts all since the start."""

    num_layers: int


@dataclass(frozen=True, slots=True)
class RankError:
    """The rank is about to exit with a status other than 0, and why; `code` as in `wire.errors`."""

    code: str
    message: str


ToRank: TypeAlias = AddRequests | AbortRequests | Stop
FromRank: TypeAlias = RankReady | StepOutput | StepProgress | RankError
Frame: TypeAlias = ToRank | FromRank

_KINDS: dict[int, type[Frame]] = {
    1: AddRequests,
    2: AbortRequests,
    3: Stop,
    16: RankReady,
    17: StepOutput,
    18: RankError,
    19: StepProgress,
}
_KIND_OF = {frame_type: kind for kind, frame_type in _KINDS.items()}
_HEADER = struct.Struct(">IB")
_RECEIVE_BYTES = 256 * 1024


def pack_frame(frame: Frame) -> bytes:
    """The frame's bytes. Raises WireError when it is above MAX_FRAME_BYTES."""
    payload = encode(frame)
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(
            f"a {type(frame).__name__} frame of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}"
        )
    return _HEADER.pack(len(payload), _KIND_OF[type(frame)]) + payload


def _parse_header(header: bytes | bytearray) -> tuple[int, type[Frame]]:
    size_bytes, kind = _HEADER.unpack_from(header)
    if size_bytes > MAX_FRAME_BYTES:
        raise WireError(f"a frame announces {size_bytes} bytes; the limit is {MAX_FRAME_BYTES}")
    frame_type = _KINDS.get(kind)
    if frame_type is None:
        raise WireError(f"unknown frame kind {kind}")
    return size_bytes, frame_type


class RankChannel:
    """Rank 0's end of the socket: blocking. Any thread may send, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(True)
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def send(self, frame: FromRank) -> None:
        """Wait until the socket has taken all of it: a slow orchestrator slows the engine.

        Raises OSError when the orchestrator is gone.
        """
        packed = pack_frame(frame)
        with self._sending:
            self._socket.sendall(packed)

    def receive(self, *, wait: bool) -> list[ToRank]:
        """All frames that have arrived, in order; with `wait`, at least one.

        Raises EOFError when the orchestrator is gone, WireError for bytes that are no frame.
        """
        frames = self._take_frames()
        while True:
            try:
                flags = 0 if wait and not frames else socket.MSG_DONTWAIT
                data = self._socket.recv(_RECEIVE_BYTES, flags)
            except BlockingIOError:
                return frames
            except ConnectionError as error:
                raise EOFError("the orchestrator closed the connection") from error
            if not data:
                if frames:
                    return frames  # the next call meets the end of file again
                raise EOFError("the orchestrator closed the connection")
            self._buffer += data
            frames += self._take_frames()

    def _take_frames(self) -> list[ToRank]:
        frames: list[ToRank] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            size_bytes, frame_type = _parse_header(self._buffer[start : start + _HEADER.size])
            end = start + _HEADER.size + size_bytes
            if len(self._buffer) < end:
                break
            frame = decode(frame_type, bytes(self._buffer[start + _HEADER.size : end]))
            if not isinstance(frame, ToRank):
                raise WireError(f"{frame_type.__name__} is no frame to a rank")
            frames.append(frame)
            start = end
        del self._buffer[:start]
        return frames


class RankConnection:
    """The orchestrator's end of the socket: asyncio streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> RankConnection:
        """Take over `sock`, the parent's end of the socket pair."""
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock))

    async def send(self, frame: ToRank) -> None:
        """Wait while the rank lags behind. Raises ConnectionError when it is gone."""
        self._writer.write(pack_frame(frame))
        await self._writer.drain()

    async def receive(self) -> FromRank | None:
        """The next frame, or None when the rank closed its end, also in the middle of a frame.

        Raises WireError for bytes that are no frame.
        """
        try:
            header = await self._reader.readexactly(_HEADER.size)
            size_bytes, frame_type = _parse_header(header)
            payload = await self._reader.readexactly(size_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        frame = decode(frame_type, payload)
        if not isinstance(frame, FromRank):
            raise WireError(f"{frame_type.__name__} is no frame from a rank")
        return frame

    async def close(self) -> None:
        """Close the socket; the rank takes it as its orchestrator's end."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return
