"""Dead letters: requests that failed for good, kept to be looked into and submitted once more.

    async with DeadLetters(url) as letters:
        for request_id in await letters.ids(reason="worker_lost"):
            new_id = await letters.replay(request_id)

The server keeps the newest 10,000, each for seven days. Their requests have ended: whoever waits
for one has its failed result.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeAlias, cast

from producer.patience import Patience
from producer.producer import (
    DEFAULT_MAX_QUEUED,
    DEFAULT_NAMESPACE,
    DEFAULT_PATIENCE_S,
    DEFAULT_URL,
    RETRY_AFTER_S,
)
from wire.client import connect, ping
from wire.codec import decode, encode
from wire.errors import IntakeFull, ResultGone, WireError
from wire.ids import RequestId
from wire.keys import MAX_NAME_CHARS, Keys
from wire.messages import Priority, Request, Result
from wire.scripts import ReplayOutcome, Scripts

_PAGE: Final = 200
_FIELDS: Final = (
    "reason",
    "result",
    "priority",
    "stream",
    "num_crashes",
    "num_errors",
    "num_journaled",
    "submitted_ms",
    "died_ms",
)
_REPLAYED = re.compile(r"(.*)\.replay-([0-9]+)", re.DOTALL)

_Fields: TypeAlias = dict[str, bytes | None]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that failed for good.

    `reason` is a stable word, `message` says for people why it failed. Its attempts: `num_crashes`
    ended with their worker group, `num_errors` with an error, and `num_journaled` tokens were
    generated. Times are milliseconds of the server's clock; `age_s` was right when it was read.
    `request` is None where it was not asked for, and where it cannot be decoded: `unreadable` then
    says why.
    """

    request_id: RequestId
    reason: str
    message: str
    priority: Priority
    stream: bool
    num_crashes: int
    num_errors: int
    num_journaled: int
    submitted_ms: int
    died_ms: int
    age_s: float
    request: Request | None = None
    unreadable: str | None = None


class DeadLetters:
    """The dead letters of a namespace; use it as `async with DeadLetters(url) as letters:`.

    `max_queued` bounds the queue that replays go into, as it does for `Producer`. When the server
    goes away, calls try again for `patience_s` seconds, then raise ServerUnreachable.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_queued: int = DEFAULT_MAX_QUEUED,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        self._url = url
        self._keys = Keys(namespace)
        self._max_queued = max_queued
        self._patience = Patience(url, patience_s)
        self._client = connect(url)
        self._scripts = Scripts(self._client, self._keys)

    async def __aenter__(self) -> Self:
        """Check that the server answers. Raises ServerUnreachable."""
        try:
            await ping(self._client, self._url)
        except BaseException:
            await self._client.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def newest(self, limit: int = 100, *, reason: str | None = None) -> list[DeadLetter]:
        """The newest dead letters (with that reason), newest first, without their requests."""
        letters: list[DeadLetter] = []
        async for page in self._pages():
            letters += [letter for letter in page if reason in (None, letter.reason)]
            if len(letters) >= limit:
                break
        return letters[:limit]

    async def ids(self, *, reason: str | None = None) -> list[RequestId]:
        """The ids of all dead letters (with that reason), newest first."""
        return [
            letter.request_id
            async for page in self._pages()
            for letter in page
            if reason in (None, letter.reason)
        ]

    async def show(self, request_id: str) -> DeadLetter:
        """One dead letter, with its request. Raises ResultGone if there is none of that id."""
        [fields] = await self._read([RequestId(request_id)], (*_FIELDS, "request"))
        if fields["died_ms"] is None:
            raise _gone(request_id)
        letter = _letter(RequestId(request_id), fields, await self._server_ms())
        try:
            return replace(letter, request=decode(Request, fields["request"] or b""))
        except WireError as error:
            return replace(letter, unreadable=str(error))

    async def replay(self, request_id: str) -> RequestId:
        """Make a new request of a dead letter, which is then gone. Returns the new request's id.

        However often it is called, the dead letter becomes one request. That has the deadline of
        the old one, counted anew. Raises ResultGone for what is no dead letter (any more),
        IntakeFull, and WireError for one that cannot be decoded; with these two the letter stays.
        """
        letter = await self.show(request_id)
        if letter.request is None:
            raise WireError(
                f"dead letter {request_id!r} cannot be replayed: {letter.unreadable}; submit the "
                f"request anew, and drop this with `forebay dead-letters drop {request_id}`"
            )
        outcome: ReplayOutcome = "known"
        while outcome == "known":
            new_id = await self._new_id(request_id)
            outcome = await self._patience.persist(
                partial(
                    self._scripts.replay,
                    letter.request_id,
                    new_id,
                    encode(replace(letter.request, request_id=new_id)),
                    max_queued=self._max_queued,
                )
            )
        if outcome == "full":
            raise IntakeFull(
                f"dead letter {request_id!r} cannot be replayed now: the queue is at its limit of "
                f"{self._max_queued} requests; try again in {RETRY_AFTER_S:g} s",
                retry_after_s=RETRY_AFTER_S,
            )
        # A first try whose reply was lost leaves no letter, but the request that it became.
        if outcome == "gone" and not await self._is_known(new_id):
            raise _gone(request_id)
        return new_id

    async def drop(self, *request_ids: str) -> list[RequestId]:
        """Delete dead letters. Returns the ids of those that there were."""
        dropped: list[RequestId] = []
        for start in range(0, len(request_ids), _PAGE):
            ids = [RequestId(request_id) for request_id in request_ids[start : start + _PAGE]]
            found = zip(ids, await self._read(ids, ("died_ms",)), strict=True)
            await self._patience.persist(partial(self._delete, ids))
            dropped += [request_id for request_id, fields in found if fields["died_ms"] is not None]
        return dropped

    async def _delete(self, ids: Sequence[RequestId]) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.zrem(self._keys.dead_letters, *ids)
            pipe.unlink(*(self._keys.dead_letter(request_id) for request_id in ids))
            await pipe.execute()

    async def _pages(self) -> AsyncIterator[list[DeadLetter]]:
        """All dead letters that there are now, newest first, a page at a time."""

        async def call() -> list[bytes]:
            return cast("list[bytes]", await self._client.zrevrange(key, 0, -1))

        key = self._keys.dead_letters
        members = await self._patience.persist(call)
        now_ms = await self._server_ms()
        for start in range(0, len(members), _PAGE):
            ids = [RequestId(member.decode()) for member in members[start : start + _PAGE]]
            found = zip(ids, await self._read(ids, _FIELDS), strict=True)
            # One that has outlived its time, or was replayed just now, is only left in the list.
            yield [_letter(id_, fields, now_ms) for id_, fields in found if fields["died_ms"]]

    async def _read(self, ids: Sequence[RequestId], names: Sequence[str]) -> list[_Fields]:
        async def call() -> list[list[bytes | None]]:
            async with self._client.pipeline(transaction=False) as pipe:
                for request_id in ids:
                    pipe.hmget(self._keys.dead_letter(request_id), *names)
                return await pipe.execute()

        rows = await self._patience.persist(call)
        return [dict(zip(names, row, strict=True)) for row in rows]

    async def _server_ms(self) -> int:
        seconds, microseconds = await self._patience.persist(self._client.time)
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _new_id(self, request_id: str) -> RequestId:
        """The id with the next number of a replay behind it under which there is no request."""
        earlier = _REPLAYED.fullmatch(request_id)
        base, number = (earlier[1], int(earlier[2])) if earlier else (request_id, 0)
        while True:
            number += 1
            suffix = f".replay-{number}"
            new_id = RequestId(base[: MAX_NAME_CHARS - len(suffix)] + suffix)
            if not await self._is_known(new_id):
                return new_id

    async def _is_known(self, request_id: RequestId) -> bool:
        key = self._keys.request(request_id)
        return bool(await self._patience.persist(lambda: self._client.exists(key)))


def _letter(request_id: RequestId, fields: _Fields, now_ms: int) -> DeadLetter:
    def text(name: str) -> str:
        return (fields[name] or b"").decode()

    def number(name: str) -> int:
        return int(fields[name] or 0)

    return DeadLetter(
        request_id=request_id,
        reason=text("reason"),
        message=_message(fields["result"] or b""),
        priority=cast("Priority", text("priority")),
        stream=text("stream") == "1",
        num_crashes=number("num_crashes"),
        num_errors=number("num_errors"),
        num_journaled=number("num_journaled"),
        submitted_ms=number("submitted_ms"),
        died_ms=number("died_ms"),
        age_s=max(0, now_ms - number("died_ms")) / 1000,
    )


def _message(result: bytes) -> str:
    try:
        error = decode(Result, result).error
    except WireError as refused:
        return f"its result cannot be decoded: {refused}"
    return error.message if error is not None else ""


def _gone(request_id: str) -> ResultGone:
    return ResultGone(
        f"there is no dead letter {request_id!r}: it was replayed or dropped, or is older than "
        "seven days, or its request never failed for good; `forebay dead-letters list` shows what "
        "there is"
    )
