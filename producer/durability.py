"""Waiting until the server's append-only file has what was submitted.

However many wait, one round at a time serves them all: whoever comes while it runs is in the next.
A round asks, over one connection and in this order:

    EXISTS the records     are they there, on the server that we talk to now?
    SET `durable`          a write behind theirs: whoever waits for it, waits for them
    WAITAOF (or INFO)      is it in the file?

The order makes up for a server that restarts in between: either the records were there before the
write, or their submissions are made again. It does not matter over which connection they were
submitted, nor whether that was just now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from producer.aof import CONFIG_NAMES, AofPolicy, AofSight, AofWatch
from producer.patience import Patience
from wire.client import is_transient
from wire.errors import ProducerClosed, ServerUnreachable
from wire.ids import RequestId
from wire.keys import DURABLE_TTL_MS, Keys

WAIT_MS = 3000
"""How long one WAITAOF may take: less than a command."""

POLL_S = 0.1


class Durability:
    """Says of requests whether the append-only file has them."""

    def __init__(self, client: Redis, keys: Keys, patience: Patience, *, patience_s: float) -> None:
        self._client = client
        self._keys = keys
        self._patience = patience
        self._patience_s = patience_s
        self._this_round: dict[RequestId, asyncio.Future[bool]] = {}
        self._next_round: dict[RequestId, asyncio.Future[bool]] = {}
        self._rounds: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raise ConfigError if the server cannot promise anything; best before submitting."""
        await self._patience.persist(self._policy)

    async def confirm(self, request_id: RequestId) -> bool:
        """Wait until a submitted request is on disk; False if the server has lost it meanwhile.

        Raises ServerUnreachable if it takes longer than the producer has patience, ConfigError.
        """
        future = self._next_round.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._next_round[request_id] = future
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._run_rounds(), name="durability")
        return await asyncio.shield(future)

    async def close(self) -> None:
        """End the round that runs; whoever waits gets ProducerClosed."""
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        closed = ProducerClosed("the producer was closed before the request was on disk")
        _fail(self._this_round | self._next_round, closed)

    async def _run_rounds(self) -> None:
        while self._next_round:
            self._this_round, self._next_round = self._next_round, {}
            try:
                found = await self._round(list(self._this_round))
            except Exception as error:  # of whatever kind: it belongs to those who wait
                _fail(self._this_round, error)
            else:
                for future, is_there in zip(self._this_round.values(), found, strict=True):
                    future.set_result(is_there)

    async def _round(self, request_ids: Sequence[RequestId]) -> list[bool]:
        give_up_s = time.monotonic() + self._patience_s
        while True:
            found = await self._patience.persist(lambda: self._try(request_ids))
            if found is not None:
                return found
            if time.monotonic() > give_up_s:
                raise ServerUnreachable(
                    f"{len(request_ids)} requests (the first is {request_ids[0]!r}) are submitted, "
                    f"but for {self._patience_s:g} s the server could not say that they are in its "
                    "append-only file: is its disk slow or full, or its appendfsync no? Submit "
                    "them again under the same ids to wait on"
                )

    async def _try(self, request_ids: Sequence[RequestId]) -> list[bool] | None:
        """Which requests are there, once those are on disk; None if that takes longer."""
        policy = await self._policy()
        async with self._client.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.exists(self._keys.request(request_id))
            pipe.set(self._keys.durable, "1", px=DURABLE_TTL_MS)
            if policy.has_waitaof:
                pipe.execute_command("WAITAOF", 1, 0, WAIT_MS)
            else:
                pipe.execute_command("INFO", "server", "persistence")
            asked_s = time.monotonic()
            *found, _, reply = await pipe.execute()
        if policy.has_waitaof:
            is_on_disk = reply[0] >= 1
        elif policy.appendfsync == "always":
            is_on_disk = True  # no reply leaves the server before what it tells of is on disk
        else:
            sight = AofSight.of(reply, asked_s=asked_s, answered_s=time.monotonic())
            is_on_disk = await self._watch(AofWatch(sight))
        return [bool(is_there) for is_there in found] if is_on_disk else None

    async def _watch(self, watch: AofWatch) -> bool:
        give_up_s = time.monotonic() + self._patience_s
        while time.monotonic() < give_up_s:
            asked_s = time.monotonic()
            info = await self._client.execute_command("INFO", "server", "persistence")
            match watch.judge(AofSight.of(info, asked_s=asked_s, answered_s=time.monotonic())):
                case "on disk":
                    return True
                case "write again":
                    return False
            await asyncio.sleep(POLL_S)
        return False

    async def _policy(self) -> AofPolicy:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.execute_command("INFO", "persistence")
            pipe.execute_command("CONFIG", "GET", *CONFIG_NAMES)
            pipe.execute_command("WAITAOF", 0, 0, 1)
            replies = await pipe.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, RedisError) and is_transient(reply):
                raise reply
        info, config, waitaof = replies
        if isinstance(info, RedisError):
            raise info
        # CONFIG is more than a user of the queue may have, and WAITAOF than an old server knows.
        return AofPolicy.of(
            info,
            None if isinstance(config, RedisError) else _config(config),
            has_waitaof=not isinstance(waitaof, RedisError),
        )


def _config(reply: Sequence[bytes]) -> dict[str, str]:
    texts = [part.decode() for part in reply]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _fail(waiting: dict[RequestId, asyncio.Future[bool]], error: Exception) -> None:
    for future in waiting.values():
        if not future.done():
            future.set_exception(error)
            future.exception()  # whoever waits still gets it; nobody waiting is no warning
