"""Making a call again while the server is away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from redis.exceptions import RedisError

from wire.client import is_transient, redis_errors

Returned = TypeVar("Returned")

_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 2.0


def retry_delays(first_s: float = _FIRST_DELAY_S, max_s: float = _MAX_DELAY_S) -> Iterator[float]:
    """How long to wait before each next try: twice as long as before, up to a bound.

    Each is shortened by a random part, so that those who lost the server at the same moment do
    not all come back at the same moment.
    """
    while True:
        yield first_s * random.uniform(0.5, 1.0)
        first_s = min(2 * first_s, max_s)


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
