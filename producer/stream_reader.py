"""One blocked read for everything that a process waits for.

A connection that blocks in XREAD can do nothing else, so a connection per awaited stream would be
the price of a thousand streaming requests. Instead one XREAD names all streams that somebody
waits for at the moment, and a *bell*: a stream of our own that gets an entry when the set grows
(or one is wanted from further back) while the read is blocked.

Nothing is read ahead: a reader that does not ask for the next entries costs no memory here, holds
up nobody, and its stream is not even named in the read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from wire.backoff import retry_delays
from wire.client import MAX_BLOCK_MS, is_transient
from wire.errors import ForebayError, ProducerClosed, ServerUnreachable
from wire.keys import BELL_TTL_MS
from wire.redaction import mask_passwords
from wire.streams import START, Entry, id_order, read

MAX_ENTRIES = 500
MIN_ENTRIES = 10
MAX_ENTRIES_AT_ONCE = 5000
"""Of one stream and of all together, in one reply: it is in memory as a whole."""


class StreamReader:
    """Waits for new entries in any number of streams, over one connection.

    When the server is away it tries again, and gives up after `patience_s`: then whoever waits
    gets ServerUnreachable. `on_return` is called when it is back, possibly without what it had
    written last.
    """

    def __init__(
        self,
        client: Redis,
        blocking_client: Redis,
        url: str,
        bell: str,
        *,
        patience_s: float,
        on_return: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._blocking_client = blocking_client
        self._url = url
        self._bell = bell
        self._bell_at = START
        self._patience_s = patience_s
        self._on_return = on_return
        self._waiting: dict[str, list[tuple[bytes, asyncio.Future[list[Entry]]]]] = {}
        self._reading: dict[str, bytes] | None = None
        self._wanted = asyncio.Event()
        self._closed = False
        self._ringing: set[asyncio.Task[None]] = set()

    def next_entries(self, key: str, after: bytes) -> asyncio.Future[list[Entry]]:
        """Resolves to the entries of `key` behind the id `after`, at least one, in order."""
        future: asyncio.Future[list[Entry]] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(ProducerClosed("the producer is closed"))
            return future
        self._waiting.setdefault(key, []).append((after, future))
        self._wanted.set()
        if self._reading is not None:
            reads_from = self._reading.get(key)
            if reads_from is None or id_order(after) < id_order(reads_from):
                self._ring()
        return future

    async def run(self) -> None:
        """Read until cancelled; whoever waits then, or asks later, gets ProducerClosed."""
        try:
            await self._read_on()
        finally:
            self._closed = True
            self._fail(ProducerClosed("the producer was closed before this was there to be read"))
            for ringing in self._ringing:
                ringing.cancel()
            await asyncio.gather(*self._ringing, return_exceptions=True)

    async def _read_on(self) -> None:
        away, give_up_s, delays = False, 0.0, retry_delays()
        while True:
            await self._wanted.wait()
            if not self._drop_abandoned():
                self._wanted.clear()
                continue
            try:
                # Back after an absence, it answers at once also where there is nothing to be read.
                await self._read(block_ms=None if away else MAX_BLOCK_MS)
            except RedisError as error:
                if not away:
                    away, give_up_s = True, time.monotonic() + self._patience_s
                if not is_transient(error) or time.monotonic() > give_up_s:
                    self._fail(
                        ServerUnreachable(
                            f"Redis server {mask_passwords(self._url)} is away ({error}); what was "
                            "submitted goes on: ask again when it is back"
                        )
                    )
                    # Whoever asks after this has patience anew.
                    give_up_s = time.monotonic() + self._patience_s
                await asyncio.sleep(next(delays))
            else:
                if away:
                    away, delays = False, retry_delays()
                    self._bell_at = START
                    self._on_return()

    async def _read(self, *, block_ms: int | None) -> None:
        positions = {
            key: min((after for after, _ in waiters), key=id_order)
            for key, waiters in self._waiting.items()
        }
        self._reading = positions
        try:
            arrived = await read(
                self._blocking_client,
                {self._bell: self._bell_at, **positions},
                count=min(MAX_ENTRIES, max(MIN_ENTRIES, MAX_ENTRIES_AT_ONCE // len(positions))),
                block_ms=block_ms,
            )
        finally:
            self._reading = None
        for key, entries in arrived.items():
            if key == self._bell:
                self._bell_at = entries[-1][0]
            else:
                self._deliver(key, entries)
        # Let those who got something ask for more, so that the next read has their streams in it.
        await asyncio.sleep(0)

    def _deliver(self, key: str, entries: list[Entry]) -> None:
        still_waiting = []
        for after, future in self._waiting.pop(key, []):
            news = [entry for entry in entries if id_order(entry[0]) > id_order(after)]
            if future.done():
                continue
            if news:
                future.set_result(news)
            else:
                still_waiting.append((after, future))
        if still_waiting:
            self._waiting[key] = still_waiting

    def _drop_abandoned(self) -> bool:
        """Forget those who wait no more; returns whether anybody is left."""
        for key, waiters in list(self._waiting.items()):
            alive = [(after, future) for after, future in waiters if not future.done()]
            if alive:
                self._waiting[key] = alive
            else:
                del self._waiting[key]
        return bool(self._waiting)

    def _fail(self, error: ForebayError) -> None:
        for waiters in self._waiting.values():
            for _, future in waiters:
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # whoever waits still gets it; nobody waiting is no warning
        self._waiting.clear()

    def _ring(self) -> None:
        task = asyncio.get_running_loop().create_task(self._ring_bell(), name="ring_bell")
        self._ringing.add(task)
        task.add_done_callback(self._ringing.discard)

    async def _ring_bell(self) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._bell, {"ring": "1"}, maxlen=1, approximate=False)
                pipe.pexpire(self._bell, BELL_TTL_MS)
                await pipe.execute()
        except RedisError:
            # The blocked read fails as well, or ends after MAX_BLOCK_MS: the key is then in.
            return
