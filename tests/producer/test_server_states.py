"""Servers that do not answer as wished, or not at all: ridden out, or explained."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import pytest
import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from producer.producer import Producer
from support.queue_driver import NAMESPACE, QueueDriver
from support.server_process import ServerProcess
from support.waiting import wait_until
from wire.backoff import retry_delays
from wire.client import connect, is_transient, ping, redis_errors
from wire.errors import ServerUnreachable


@contextlib.contextmanager
def setting(server: ServerProcess, *, name: str, value: str) -> Iterator[None]:
    server.command("CONFIG", "SET", name, value)
    yield
    server.command("CONFIG", "SET", name, "0")


@contextlib.contextmanager
def replica(server: ServerProcess) -> Iterator[None]:
    server.command("REPLICAOF", "127.0.0.1", "1")
    yield
    server.command("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def failing_disk(server: ServerProcess) -> Iterator[None]:
    """A snapshot cannot be put where a directory is."""
    obstacle = server.directory / "dump.rdb"
    obstacle.mkdir()
    server.command("CONFIG", "SET", "save", "3600 1")
    server.command("BGSAVE")
    with redis.Redis.from_url(server.url) as client:
        assert wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    server.command("CONFIG", "SET", "save", "")


@contextlib.contextmanager
def busy(server: ServerProcess) -> Iterator[None]:
    server.command("CONFIG", "SET", "busy-reply-threshold", "1")

    def run_for_ever() -> None:
        with contextlib.suppress(redis.RedisError):
            server.command("EVAL", "while true do end", 0)

    script = threading.Thread(target=run_for_ever)
    script.start()
    assert wait_until(lambda: not server.answers())
    yield
    server.command("SCRIPT", "KILL")
    script.join()


State: TypeAlias = Callable[[ServerProcess], AbstractContextManager[None]]
STATES: dict[str, tuple[State, str]] = {
    "OOM": (functools.partial(setting, name="maxmemory", value="1"), "raise maxmemory"),
    "READONLY": (replica, "point the URL at the primary"),
    "NOREPLICAS": (
        functools.partial(setting, name="min-replicas-to-write", value="1"),
        "min-replicas-to-write",
    ),
    "MISCONF": (failing_disk, "make room"),
    "BUSY": (busy, "SCRIPT KILL"),
}


@pytest.mark.parametrize("state", STATES)
async def test_a_state_of_the_server_is_explained_or_ridden_out(
    own_server: ServerProcess, own_queue: QueueDriver, state: str
) -> None:
    enter, advice = STATES[state]
    async with (
        Producer(own_server.url, namespace=NAMESPACE, patience_s=0.1) as hasty,
        Producer(own_server.url, namespace=NAMESPACE) as patient,
    ):
        with enter(own_server):
            with pytest.raises(ServerUnreachable, match=advice):
                await hasty.submit("x", request_id="a")
            submitting = asyncio.ensure_future(patient.submit("x", request_id="b"))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(submitting), 0.1)
        await asyncio.wait_for(submitting, 5)
        assert await own_queue.queue() == ["b"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BusyLoadingError("loading the dataset in memory"), True),
        (MasterDownError("Link with MASTER is down"), True),
        (ClusterDownError("The cluster is down"), True),
        (TryAgainError("Multiple keys request during rehashing of slot"), True),
        (NoScriptError("No matching script"), True),
        (TimeoutError("Timeout reading from socket"), True),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (ResponseError("UNBLOCKED force unblock from blocking operation"), True),
        (ResponseError("Command # 1 (XDEL x) of pipeline caused error: ('BUSY is busy',)"), True),
        (ResponseError("BUSYGROUP Consumer Group name already exists"), False),
        (ResponseError("WRONGTYPE Operation against a key holding MISCONF values"), False),
        (AuthenticationError("invalid username-password pair"), False),
        (NoPermissionError("this user has no permissions"), False),
    ],
)
def test_what_can_pass_is_told_from_what_cannot(error: RedisError, expected: bool) -> None:
    assert is_transient(error) is expected
    with (
        pytest.raises(ServerUnreachable, match="Redis server unix:///s"),
        redis_errors("unix:///s"),
    ):
        raise error


async def test_a_server_that_stops_answering_is_noticed_and_the_request_queued_once(
    own_server: ServerProcess, own_queue: QueueDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half open: the connection stands, and nothing comes back. What was sent is in its buffers."""
    quick: Any = functools.partial(connect, timeout_s=0.1)
    monkeypatch.setattr("producer.queue_client.connect", quick)
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        own_server.stop()
        client = quick(own_server.url)
        with pytest.raises(ServerUnreachable, match="does not answer in time"):
            await ping(client, own_server.url)
        await client.aclose()
        submitting = asyncio.ensure_future(producer.submit("x", request_id="a"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(submitting), 0.4)
        own_server.cont()
        handle = await asyncio.wait_for(submitting, 10)
        await own_queue.join()
        assert await own_queue.queue() == ["a"]
        await handle.cancel()
        assert (await handle.outcome()).state == "cancelled"


def test_tries_come_less_and_less_often_and_not_in_step() -> None:
    delays = [list(itertools.islice(retry_delays(0.05, 2.0), 10)) for _ in range(20)]
    for number, same_try in enumerate(zip(*delays, strict=True)):
        longest_s = min(0.05 * 2**number, 2.0)
        assert all(longest_s / 2 <= delay_s <= longest_s for delay_s in same_try)
        assert len(set(same_try)) > 1


async def test_idle_connections_are_kept_alive_or_found_dead(redis_url: str) -> None:
    client = connect("redis://127.0.0.1:6379/0")
    connection = client.connection_pool.make_connection()
    assert connection.socket_keepalive
    assert connection.socket_keepalive_options[socket.TCP_KEEPIDLE] == 15
    for url in (redis_url, "redis://127.0.0.1:6379/0?socket_keepalive=false"):
        other = connect(url).connection_pool.make_connection()
        assert not getattr(other, "socket_keepalive", False)
