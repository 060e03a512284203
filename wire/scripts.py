"""The Lua scripts as typed calls, so that the order of KEYS and ARGV is known in one place.

Each method is one round trip and atomic on the server. Method docstrings say what comes back;
the scripts in `wire/lua` say what is done.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

from redis.asyncio import Redis

from wire.ids import BatchId, GroupId, RequestId
from wire.keys import Keys
from wire.messages import CommitState, Priority, RequestState, TerminalState

SubmitOutcome = Literal["new", "known", "full"]
ReplayOutcome = Literal["new", "known", "gone", "full"]
ReclaimReason = Literal["leaving", "crashed", "lapsed"]
"""An orderly leave; a crash that the group itself reports; a lease that was not renewed."""

_CACHED_PREFIX = struct.Struct("<III")
"""A record of directory_query.lua: which group, blocks on its device, blocks in all."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One request on its way into the queue; `message` is an encoded Request."""

    request_id: RequestId
    priority: Priority
    stream: bool
    timeout_ms: int | None
    message: bytes


@dataclass(frozen=True, slots=True)
class Queued:
    """A request as a scheduler found it: its fencing token and where it stands in the intake."""

    request_id: RequestId
    fence: int
    priority: Priority
    entry_id: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """What a group did for one request: an encoded Chunk, and if it ended, an encoded Result.

    `offset` and `num_tokens` are the chunk's. With the state "retry" the result is what is stored
    should there be no other attempt.
    """

    request_id: RequestId
    fence: int
    chunk: bytes = b""
    state: CommitState | None = None
    result: bytes = b""
    offset: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FleetEntry:
    """A group as Redis knows it; `status` is an encoded GroupStatus, None if it is lost.

    Its lease ends at `lease_until_ms` of the server's clock. `exclusive`: what it holds, or is to
    hold next, it must have for itself.
    """

    group_id: GroupId
    epoch: int
    lease_until_ms: int
    status: bytes | None
    num_owned: int
    exclusive: bool


@dataclass(frozen=True, slots=True)
class DirectoryUpdate:
    """What has changed in a group's cache: hashes of blocks, 16 bytes each, in a row.

    `device` are in the device's memory now, `host` in host memory alone, `gone` in neither. Updates
    are numbered from 1 on; a `reset` begins from an empty cache.
    """

    number: int
    reset: bool = False
    device: bytes = b""
    host: bytes = b""
    gone: bytes = b""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """How many blocks of a prompt a group has cached, from the first one on.

    The first of them are on the device, the others in host memory.
    """

    num_device_blocks: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ends in the queue; `dead` is the reason for which it is dead-lettered."""

    queued: Queued
    state: TerminalState
    result: bytes
    dead: str = ""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """How many requests the group did not know of, and the journals' lengths of those it holds."""

    num_released: int
    num_journaled: dict[RequestId, int]


class Scripts:
    """The state changes of the queue, bound to one client and one partition."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._keys = keys
        self._scripts = {
            name: client.register_script(source) for name, source in _sources().items()
        }

    async def _run(self, name: str, *args: str | bytes | int) -> Any:
        return await self._scripts[name](keys=[self._keys.prefix], args=list(args))

    async def submit(
        self,
        submissions: Sequence[Submission],
        *,
        reply_to: str,
        result_ttl_ms: int,
        max_queued: int,
        max_unread: int,
    ) -> list[SubmitOutcome]:
        """One outcome for each submission: accepted now, known from before, or refused."""
        args: list[str | bytes | int] = [max_queued, max_unread, result_ttl_ms, reply_to]
        for item in submissions:
            timeout_ms = "" if item.timeout_ms is None else item.timeout_ms
            args += [item.request_id, item.priority, int(item.stream), timeout_ms, item.message]
        outcomes = await self._run("submit", *args)
        return [cast("SubmitOutcome", outcome.decode()) for outcome in outcomes]

    async def cancel(
        self, request_id: RequestId, result: bytes
    ) -> RequestState | Literal["requested", "unknown"]:
        """The state that the request has now; "requested" if its group was told to stop it."""
        state = await self._run("cancel", request_id, result)
        return cast("RequestState", state.decode())

    async def assign(
        self,
        group_id: GroupId,
        epoch: int,
        *,
        credits: int,
        batch_id: BatchId,
        batch: Sequence[tuple[Queued, int, bytes]],
        exclusive: bool = False,
    ) -> list[RequestId] | Literal["gone", "full"]:
        """The ids that were assigned, each under its new fence; or why the group took nothing.

        `batch` has each request's new fence and its encoded Assignment.
        """
        args: list[str | bytes | int] = [group_id, epoch, credits, batch_id, int(exclusive)]
        for queued, new_fence, assignment in batch:
            args += [
                queued.request_id,
                queued.fence,
                new_fence,
                queued.priority,
                queued.entry_id,
                assignment,
            ]
        reply = await self._run("assign", *args)
        if isinstance(reply, bytes):
            return cast('Literal["gone", "full"]', reply.decode())
        return [RequestId(request_id.decode()) for request_id in reply]

    async def reject(self, endings: Sequence[Ending]) -> int:
        """End requests in the queue. Returns how many were ended."""
        args: list[str | bytes | int] = []
        for ending in endings:
            queued = ending.queued
            args += [queued.request_id, queued.fence, queued.priority, queued.entry_id]
            args += [ending.state, ending.result, ending.dead]
        return int(await self._run("reject", *args))

    async def retry(
        self, *, max_errors: int, delay_ms: int, max_delay_ms: int, limit: int
    ) -> tuple[int, int]:
        """How many requests were queued again after an error, and how many failed for good."""
        num_queued, num_failed = await self._run("retry", max_errors, delay_ms, max_delay_ms, limit)
        return int(num_queued), int(num_failed)

    async def replay(
        self, request_id: RequestId, new_id: RequestId, message: bytes, *, max_queued: int
    ) -> ReplayOutcome:
        """What became of a dead letter: only a "new" request takes its place."""
        outcome = await self._run("replay", request_id, new_id, message, max_queued)
        return cast("ReplayOutcome", outcome.decode())

    async def commit(
        self, group_id: GroupId, epoch: int, progress: Sequence[Progress]
    ) -> list[RequestId]:
        """The ids that the group no longer holds under their fence; those were left alone."""
        args: list[str | bytes | int] = [group_id, epoch]
        for item in progress:
            args += [item.request_id, item.fence, item.chunk, item.state or "", item.result]
            args += [item.offset, item.num_tokens]
        stale = await self._run("commit", *args)
        return [RequestId(request_id.decode()) for request_id in stale]

    async def register(self, group_id: GroupId, *, model: str, card: bytes) -> int:
        """The group's new epoch."""
        return int(await self._run("register", group_id, model, card))

    async def heartbeat(
        self,
        group_id: GroupId,
        epoch: int,
        *,
        timeout_ms: int,
        first: bool,
        model: str,
        status: bytes,
    ) -> int | None:
        """The server's time in ms; None if the group was declared dead under this epoch."""
        reply = await self._run("heartbeat", group_id, epoch, timeout_ms, int(first), model, status)
        return int(reply) or None

    async def fleet(self) -> tuple[int, list[FleetEntry]]:
        """The server's time in ms, and every group that was not declared dead."""
        reply = await self._run("fleet")
        entries = []
        for member, lease_ms, status, num_owned, exclusive in zip(
            *(reply[first::5] for first in range(1, 6)), strict=True
        ):
            group_id, _, epoch = member.decode().rpartition(":")
            entries.append(
                FleetEntry(
                    GroupId(group_id),
                    int(epoch),
                    int(lease_ms),
                    status or None,
                    int(num_owned),
                    bool(exclusive),
                )
            )
        return int(reply[0]), entries

    async def directory_update(
        self, group_id: GroupId, epoch: int, update: DirectoryUpdate
    ) -> int | None:
        """The number of the last update that was carried out, 0 if there was none yet.

        None, and nothing was changed, if the group does not live under this epoch.
        """
        last = await self._run(
            "directory_update",
            group_id,
            epoch,
            update.number,
            int(update.reset),
            update.device,
            update.host,
            update.gone,
        )
        return None if last < 0 else int(last)

    async def directory_query(self, chains: Sequence[bytes]) -> list[dict[str, CachedPrefix]]:
        """What the living groups have of each chain (hashes of blocks in a row), by "group:epoch".

        Groups that have none of a chain are left out of its answer.
        """
        groups, *answers = await self._run("directory_query", *chains)
        names = [name.decode() for name in groups]
        return [
            {
                names[index]: CachedPrefix(num_device_blocks, num_blocks)
                for index, num_device_blocks, num_blocks in _CACHED_PREFIX.iter_unpack(answer)
            }
            for answer in answers
        ]

    async def drop_consumer(self, stream: str, group: str, consumer: str) -> bool:
        """Whether the consumer is out of its group: it stays while entries are pending for it."""
        return bool(await self._run("drop_consumer", stream, group, consumer))

    async def reconcile(
        self, group_id: GroupId, epoch: int, position: bytes, known: Sequence[RequestId]
    ) -> Reconciled | None:
        """What group and queue agree on now; None if there is mail for it behind `position`."""
        reply = await self._run("reconcile", group_id, epoch, position, *known)
        if reply[0] < 0:
            return None
        journaled = zip(reply[1::2], reply[2::2], strict=True)
        return Reconciled(
            int(reply[0]), {RequestId(name.decode()): int(count) for name, count in journaled}
        )

    async def reclaim(
        self,
        group_id: GroupId,
        epoch: int,
        *,
        how: ReclaimReason,
        max_crashes: int,
        limit: int,
        result: bytes,
    ) -> tuple[int, int] | None:
        """How many requests were taken back and how many of them failed; None if it is alive."""
        taken, failed = await self._run("reclaim", group_id, epoch, how, max_crashes, limit, result)
        return None if taken < 0 else (int(taken), int(failed))


@cache
def _sources() -> dict[str, str]:
    folder = resources.files("wire") / "lua"
    sources = {file.name.removesuffix(".lua"): file.read_text() for file in folder.iterdir()}
    common = sources.pop("common")
    return {name: f"{common}\n{source}" for name, source in sources.items()}
