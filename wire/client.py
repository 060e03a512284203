"""Connections to the Redis server, and its errors as ours.

Clients never retry by themselves: a command whose reply was lost may have been carried out, and
only the caller knows whether it can be sent again. Blocking reads get a client of their own,
whose socket timeout is longer than the longest block.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import (
    Connection,
    ConnectionPool,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from wire.connection import CONNECTION_CLASSES
from wire.errors import ConfigError, ServerUnreachable
from wire.redaction import mask_passwords

COMMAND_TIMEOUT_S = 5.0
"""How long a command may take before its connection counts as dead (half open).

Long enough for a server that stalls on its disk or forks; short enough that a caller who is
patient for 30 s gets several tries, each on a new connection. Every command that is sent again
after that may be carried out twice without harm.
"""

MAX_BLOCK_MS = 5000
"""The longest that a blocking read may wait on the server."""

_SCHEMES = ("redis", "rediss", "unix")

# A connection that lies idle in the pool is found dead by the kernel after 15 + 3 * 5 s, before
# the next command has to find it out by its timeout; and no firewall forgets it meanwhile.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


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
        kind = options.pop("connection_class", Connection)
        options["connection_class"] = CONNECTION_CLASSES[kind]
        if kind is not UnixDomainSocketConnection:
            options = _keepalive_options() | options
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


def _keepalive_options() -> dict[str, Any]:
    # Not every system has all three; its own defaults then hold.
    known = {name: value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
    options = {getattr(socket, name): value for name, value in known.items()}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


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


# States of a server that pass, or that somebody can end while we wait, by the first word of the
# error that it answers with.
_PASSING_STATES = {
    "BUSY": "a script keeps it busy; wait, or end that one with SCRIPT KILL",
    "CLUSTERDOWN": "its cluster has lost nodes; restore them",
    "LOADING": "it is still loading its data; try again shortly",
    "MASTERDOWN": "it is a replica that has lost its primary; point the URL at the primary",
    "MISCONF": "it cannot write to its disk; see its log, and make room",
    "NOREPLICAS": "it misses the replicas that min-replicas-to-write asks for; restore them",
    "NOSCRIPT": "its scripts were flushed in that very moment; try again",
    "OOM": "it is out of memory; raise maxmemory or let the queue drain",
    "READONLY": "it is a read-only replica; point the URL at the primary",
    "TRYAGAIN": "its cluster is moving these keys; try again shortly",
    "UNBLOCKED": "its role has just changed; point the URL at the primary",
}

# The client gives some states a class of their own, and takes their first word away.
_STATE_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (BusyLoadingError, "LOADING"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (NoScriptError, "NOSCRIPT"),
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (TryAgainError, "TRYAGAIN"),
)

# At the beginning, or behind what a pipeline puts in front to name the command.
_STATE_WORD = re.compile(rf"(?:^|caused error: \(['\"])({'|'.join(_PASSING_STATES)})\b")


def _passing_state(error: RedisError) -> str | None:
    for kind, state in _STATE_CLASSES:
        if isinstance(error, kind):
            return state
    found = _STATE_WORD.search(str(error))
    return found[1] if found else None


def _explain(error: RedisError, server: str) -> str:
    state = _passing_state(error)
    if state is not None:
        return f"Redis server {server}: {error}; {_PASSING_STATES[state]}"
    advice: tuple[tuple[type[Any] | tuple[type[Any], ...], str], ...] = (
        ((AuthenticationError, NoPermissionError), "check the user and password in the URL"),
        (MaxConnectionsError, "too much is asked of it at once; wait for some of it first"),
        (TimeoutError, "it does not answer in time; is it overloaded or stopped?"),
        (ConnectionError, "is it running, and is the URL right?"),
    )
    if str(error).startswith("Timeout"):
        error = TimeoutError(str(error))  # in the middle of connecting it has another class
    for kinds, what_to_do in advice:
        if isinstance(error, kinds):
            return f"Redis server {server}: {error}; {what_to_do}"
    return f"Redis server {server} refused a command: {error}"


def is_transient(error: RedisError) -> bool:
    """Whether waiting and trying again can help."""
    if isinstance(error, AuthenticationError | NoPermissionError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or _passing_state(error) is not None
