"""A short way to move requests through the queue's scripts on a real server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

from redis.asyncio import Redis

from wire.client import connect
from wire.codec import encode
from wire.ids import BatchId, GroupId, RequestId, token_ids
from wire.keys import Keys
from wire.messages import (
    Assignment,
    Chunk,
    CommitState,
    GroupStatus,
    ModelCard,
    Priority,
    Prompt,
    Request,
    RequestState,
    Result,
)
from wire.records import RESULT_FIELDS, ending, result_from_record
from wire.sampling import SamplingParams
from wire.scripts import Progress, Queued, ReclaimReason, Scripts, Submission, SubmitOutcome
from wire.streams import entries

NAMESPACE = "test"
LONG_MS = 60_000


class QueueDriver:
    """Every step of a request's life as one call; what a step needs to know is read first."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.keys = Keys(NAMESPACE)
        self.scripts = Scripts(client, self.keys)

    async def submit(
        self,
        *ids: str,
        priority: Priority = "standard",
        stream: bool = False,
        timeout_ms: int | None = None,
        reply_to: str = "results",
        result_ttl_ms: int = LONG_MS,
        max_queued: int = 1000,
        max_unread: int = 1000,
        model: str | None = None,
        message: bytes | None = None,
    ) -> list[SubmitOutcome]:
        submissions = [
            Submission(
                RequestId(request_id),
                priority,
                stream,
                timeout_ms,
                message if message is not None else request_message(request_id, model, stream),
            )
            for request_id in ids
        ]
        return await self.scripts.submit(
            submissions,
            reply_to=reply_to,
            result_ttl_ms=result_ttl_ms,
            max_queued=max_queued,
            max_unread=max_unread,
        )

    async def record(self, request_id: str) -> dict[str, bytes]:
        key = self.keys.request(RequestId(request_id))
        fields = cast("dict[bytes, bytes]", await self.client.hgetall(key))
        return {name.decode(): value for name, value in fields.items()}

    async def dead_letter(self, request_id: str) -> dict[str, bytes]:
        key = self.keys.dead_letter(RequestId(request_id))
        fields = cast("dict[bytes, bytes]", await self.client.hgetall(key))
        return {name.decode(): value for name, value in fields.items()}

    async def state(self, request_id: str) -> str | None:
        state = (await self.record(request_id)).get("state")
        return None if state is None else state.decode()

    async def fence(self, request_id: str) -> int:
        return int((await self.record(request_id))["fence"])

    async def queued(self, request_id: str) -> Queued:
        """What a scheduler that has just read the request knows of it."""
        record = await self.record(request_id)
        priority = cast("Priority", record["priority"].decode())
        entry = record.get("entry", b"0-1")
        return Queued(RequestId(request_id), int(record["fence"]), priority, entry)

    async def epoch(self, group: str = "g") -> int:
        """The group's last epoch."""
        return int(await self.client.get(f"{self.keys.prefix}:epoch:{group}") or 0)

    async def join(
        self,
        group: str = "g",
        *,
        timeout_ms: int = LONG_MS,
        model: str = "m",
        card: ModelCard | None = None,
        **status: Any,
    ) -> int:
        data = b"no card" if card is None else encode(card)
        epoch = await self.scripts.register(GroupId(group), model=model, card=data)
        assert await self.beat(
            group, epoch, first=True, timeout_ms=timeout_ms, model=model, **status
        )
        return epoch

    async def beat(
        self,
        group: str = "g",
        epoch: int | None = None,
        *,
        first: bool = False,
        timeout_ms: int = LONG_MS,
        model: str = "m",
        **status: Any,
    ) -> int | None:
        epoch = await self.epoch(group) if epoch is None else epoch
        whole = replace(GroupStatus(GroupId(group), epoch, model, 1, 8, "healthy"), **status)
        return await self.scripts.heartbeat(
            whole.group_id,
            epoch,
            timeout_ms=timeout_ms,
            first=first,
            model=model,
            status=encode(whole),
        )

    async def kill(self, group: str = "g", epoch: int | None = None) -> None:
        """Let a group's lease run out."""
        epoch = await self.epoch(group) if epoch is None else epoch
        await self.client.zadd(self.keys.groups, {f"{group}:{epoch}": 1}, xx=True)

    async def assign(
        self,
        *requests: str | Queued,
        group: str = "g",
        epoch: int | None = None,
        credits: int = 8,
        exclusive: bool = False,
    ) -> list[RequestId] | str:
        """Assign under fences that are one higher; to the group's last epoch if none is given."""
        batch = []
        for request in requests:
            queued = await self.queued(request) if isinstance(request, str) else request
            new_fence = queued.fence + 1
            batch.append((queued, new_fence, assignment(queued.request_id, new_fence)))
        return await self.scripts.assign(
            GroupId(group),
            await self.epoch(group) if epoch is None else epoch,
            credits=credits,
            batch_id=BatchId("b"),
            batch=batch,
            exclusive=exclusive,
        )

    async def commit(
        self, *progress: Progress, group: str = "g", epoch: int | None = None
    ) -> list[RequestId]:
        epoch = await self.epoch(group) if epoch is None else epoch
        return await self.scripts.commit(GroupId(group), epoch, progress)

    async def retry(
        self,
        *,
        max_errors: int = 3,
        delay_ms: int = 100,
        max_delay_ms: int = 1000,
        limit: int = 100,
    ) -> tuple[int, int]:
        return await self.scripts.retry(
            max_errors=max_errors, delay_ms=delay_ms, max_delay_ms=max_delay_ms, limit=limit
        )

    async def cancel(self, request_id: str) -> RequestState | str:
        return await self.scripts.cancel(RequestId(request_id), encode(ending("cancelled")))

    async def reclaim(
        self,
        group: str = "g",
        epoch: int | None = None,
        *,
        how: ReclaimReason = "lapsed",
        max_crashes: int = 3,
        limit: int = 100,
    ) -> tuple[int, int] | None:
        return await self.scripts.reclaim(
            GroupId(group),
            await self.epoch(group) if epoch is None else epoch,
            how=how,
            max_crashes=max_crashes,
            limit=limit,
            result=encode(ending("failed")),
        )

    async def result(self, request_id: str) -> Result | None:
        rid = RequestId(request_id)
        fields = await self.client.hmget(self.keys.request(rid), *RESULT_FIELDS)
        return result_from_record(rid, cast("list[bytes | None]", fields))

    async def ended(self, name: str = "results") -> list[tuple[str, str]]:
        """The results stream: ids and states in the order in which requests ended."""
        found = await entries(self.client, self.keys.results(name))
        return [(f[b"request_id"].decode(), f[b"state"].decode()) for _, f in found]

    async def queue(self, priority: Priority = "standard") -> list[str]:
        """The ids in an intake stream."""
        found = await entries(self.client, self.keys.intakes[priority])
        return [fields[b"request_id"].decode() for _, fields in found]


@contextlib.asynccontextmanager
async def open_queue(url: str) -> AsyncIterator[QueueDriver]:
    client = connect(url)
    try:
        yield QueueDriver(client)
    finally:
        await client.aclose()


def request_message(request_id: str, model: str | None = None, stream: bool = False) -> bytes:
    return encode(Request(RequestId(request_id), Prompt(text="Hi"), model=model, stream=stream))


def assignment(request_id: RequestId, fence: int) -> bytes:
    return encode(Assignment(request_id, fence, token_ids([1]), SamplingParams(), False))


def tokens(request_id: str, fence: int, offset: int, *new: int) -> Progress:
    """Progress by some tokens, each with one character of text."""
    chunk = Chunk(fence, offset, token_ids(new), "x" * len(new), offset)
    return Progress(RequestId(request_id), fence, encode(chunk), offset=offset, num_tokens=len(new))


def end(request_id: str, fence: int, state: CommitState = "done") -> Progress:
    """The end of a request, or of an attempt at it."""
    ending_state = "failed" if state == "retry" else state
    result = encode(Result(RequestId(request_id), ending_state, text=f"by {fence}"))
    return Progress(RequestId(request_id), fence, state=state, result=result)
