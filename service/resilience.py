"""Loops that ride out a server that is away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

import structlog
from redis.exceptions import RedisError

from wire.backoff import retry_delays
from wire.client import is_transient

log = structlog.get_logger(__name__)


async def repeat(
    name: str,
    step: Callable[[], Awaitable[None]],
    *,
    stop: asyncio.Event,
    on_reconnect: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Await `step()` again and again until `stop` is set.

    While the server is unreachable, busy or full, wait between tries, up to two seconds; once it
    answers again, await `on_reconnect` first. Any other error ends the loop.
    """
    away, delays = False, retry_delays()
    while not stop.is_set():
        try:
            if away and on_reconnect is not None:
                await on_reconnect()
            await step()
        except RedisError as error:
            if not is_transient(error):
                raise
            away, delay_s = True, next(delays)
            log.warning(
                "server unreachable", task=name, error=str(error), retry_in_s=round(delay_s, 3)
            )
            await sleep_unless(stop, delay_s)
        else:
            if away:
                log.info("server back", task=name)
                away, delays = False, retry_delays()


@contextlib.contextmanager
def one_error(preferred: type[BaseException] = BaseException) -> Iterator[None]:
    """Out of a group of errors, raise one: the first, or the first of the `preferred` kind.

    For task groups in which one failure ends everything: the others are its consequences.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group.subgroup(preferred) or group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def sleep_unless(stop: asyncio.Event, delay_s: float) -> None:
    """Sleep, but no longer than until `stop` is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(delay_s):
            await stop.wait()


async def next_beat(stop: asyncio.Event, every_s: float) -> None:
    """Sleep until the clock shows a multiple of `every_s`, but no longer than until `stop` is set.

    What is done now and then is done together like that: what it costs is mostly to wake a process
    from its sleep, less what it then does.
    """
    await sleep_unless(stop, every_s - time.monotonic() % every_s)
