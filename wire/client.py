"""Connections to the Redis server, and its errors as ours.

Clients never retry by themselves: a command whose reply was lost may have been carried out, and
only the caller knows whether it can be sent again. Blocking reads get a client of their own,
whose socket timeout is longer than the longest block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from wire.connection import CONNECTION_CLASSES
from wire.errors import ConfigError, ServerUnreachable
from wire.redaction import mask_passwords

COMMAND_TIMEOUT_S = 10.0
MAX_BLOCK_MS = 5000
"""The longest that a blocking read may wait on the server."""

_SCHEMES = ("redis", "rediss", "unix")


def connect(url: str, *, blocking: bool = False, timeout_s: float = COMMAND_TIMEOUT_S) -> Redis:
    """A client for `url` (redis://, rediss:// or unix://); nothing is sent yet.

    `timeout_s` bounds connecting and each command; `blocking` makes a client for reads that block
    up to MAX_BLOCK_MS on top of that. Close it with `aclose()`.
    Raises ConfigError for a URL that cannot be used.
    """
    scheme = url.partition("://")[0]
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"Redis URL {mask_passwords(url)!r} must begin with redis://, rediss:// or unix://"
        )
    try:
        options: dict[str, Any] = dict(parse_url(url))
        options["connection_class"] = CONNECTION_CLASSES[
            options.pop("connection_class", Connection)
        ]
        pool = ConnectionPool(
            **options,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s + (MAX_BLOCK_MS / 1000 if blocking else 0),
            socket_connect_timeout=timeout_s,
            protocol=2,
            decode_responses=False,
        )
        pool.make_connection()  # connects to nothing, but knows which options there are
    except TypeError as error:
        raise ConfigError(
            f"Redis URL {mask_passwords(url)!r} has an option behind its ? that is not known"
        ) from error
    except ValueError as error:
        raise ConfigError(f"Redis URL {mask_passwords(url)!r} cannot be used: {error}") from error
    return Redis.from_pool(pool)


async def ping(client: Redis, url: str) -> None:
    """Raise ServerUnreachable, with the way out, unless the server at `url` answers."""
    with redis_errors(url):
        await client.execute_command("PING")


@contextlib.contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn Redis' errors into ServerUnreachable, naming the server and what to do."""
    try:
        yield
    except RedisError as error:
        raise ServerUnreachable(_explain(error, mask_passwords(url))) from error


def _explain(error: RedisError, server: str) -> str:
    advice: tuple[tuple[type[Any] | tuple[type[Any], ...], str], ...] = (
        ((AuthenticationError, NoPermissionError), "check the user and password in the URL"),
        (BusyLoadingError, "it is still loading its data; try again shortly"),
        (OutOfMemoryError, "it is out of memory; raise maxmemory or let the queue drain"),
        (ReadOnlyError, "it is a read-only replica; point the URL at the primary"),
        (TimeoutError, "it does not answer in time; is it overloaded or stopped?"),
        (ConnectionError, "is it running, and is the URL right?"),
    )
    for kinds, what_to_do in advice:
        if isinstance(error, kinds):
            return f"Redis server {server}: {error}; {what_to_do}"
    return f"Redis server {server} refused a command: {error}"


def is_transient(error: RedisError) -> bool:
    """Whether waiting and trying again can help."""
    permanent = (AuthenticationError, NoPermissionError)
    transient = (ConnectionError, TimeoutError, BusyLoadingError, OutOfMemoryError, ReadOnlyError)
    return isinstance(error, transient) and not isinstance(error, permanent)
