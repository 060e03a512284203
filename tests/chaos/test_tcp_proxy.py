"""What the proxy does to connections, as a client sees it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import redis

from support.tcp_proxy import TcpProxy


@pytest.fixture
def line(redis_url: str) -> Iterator[TcpProxy]:
    with TcpProxy(redis_url.removeprefix("unix://"), seed=1) as proxy:
        yield proxy


@pytest.fixture
def client(line: TcpProxy) -> Iterator[redis.Redis]:
    """A client that tries nothing twice, and waits for 0.2 s."""
    with redis.Redis.from_url(line.url, socket_timeout=0.2, retry=None, protocol=2) as client:
        assert client.ping()
        yield client


def test_a_cut_ends_connections_and_lets_new_ones_through(line: TcpProxy) -> None:
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", line.port), timeout=10) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100) == b"+PONG\r\n"
            line.cut()
            assert connection.recv(100) == b""


def test_a_command_whose_reply_is_lost_was_carried_out(line: TcpProxy, client: redis.Redis) -> None:
    line.lose_replies(1.0)
    with pytest.raises(redis.ConnectionError):
        client.set("key", "value", ex=60)
    line.heal()
    assert client.get("key") == b"value"
    assert line.num_lost_replies == 1


def test_a_trap_keeps_the_reply_to_one_command_and_no_error(
    line: TcpProxy, client: redis.Redis
) -> None:
    trap = line.trap_reply(lambda command: b"wanted" in command)
    with pytest.raises(redis.ResponseError):
        client.execute_command("NONSENSE", "wanted")
    assert client.get("other") is None
    assert not trap.is_sprung
    with pytest.raises(redis.TimeoutError):
        client.set("wanted", "value", ex=60)
    trap.wait()
    assert client.get("wanted") == b"value"


def test_what_was_held_arrives_later(line: TcpProxy, client: redis.Redis) -> None:
    line.hold()
    with pytest.raises(redis.TimeoutError):
        client.set("key", "value", ex=60)
    line.heal()
    while client.get("key") is None:
        pass


def test_what_was_swallowed_never_arrives_and_its_connection_ends(
    line: TcpProxy, client: redis.Redis
) -> None:
    with redis.Redis.from_url(line.url, socket_timeout=30, retry=None, protocol=2) as patient:
        assert patient.ping()
        [connection] = patient.connection_pool._available_connections
        line.swallow()
        connection.send_command("SET", "key", "value", "EX", "60")
        with pytest.raises(redis.TimeoutError):
            client.ping()
        line.heal()
        with pytest.raises(redis.ConnectionError):
            connection.read_response()
        assert patient.get("key") is None
