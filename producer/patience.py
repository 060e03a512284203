"""Making a call again while the server is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

from wire.backoff import retry_delays
from wire.client import is_transient, redis_errors

Returned = TypeVar("Returned")


class Patience:
    """Makes calls that may be repeated, again and again for `patience_s` seconds."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s

    async def persist(self, call: Callable[[], Awaitable[Returned]]) -> Returned:
        """What `call` returns. Raises ServerUnreachable when the server stays away."""
        give_up_s = time.monotonic() + self._patience_s
        with redis_errors(self._url):
            for delay_s in retry_delays():
                try:
                    return await call()
                except RedisError as error:
                    if not is_transient(error) or time.monotonic() + delay_s > give_up_s:
                        raise
                await asyncio.sleep(delay_s)
        raise AssertionError("there is always a next delay")
