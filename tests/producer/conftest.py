"""Queues to drive by hand, and servers to mistreat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from forebay.broker_binary import BrokerBinary
from support.queue_driver import QueueDriver, open_queue
from support.server_process import ServerProcess, server_process


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[QueueDriver]:
    """The queue on the server that the session's tests share."""
    async with open_queue(redis_url) as driver:
        yield driver


@pytest.fixture
def own_server(broker_binary: BrokerBinary) -> Iterator[ServerProcess]:
    """A server of the test's own."""
    with server_process(broker_binary) as server:
        yield server


@pytest.fixture
async def own_queue(own_server: ServerProcess) -> AsyncIterator[QueueDriver]:
    """The queue on the test's own server."""
    async with open_queue(own_server.url) as driver:
        yield driver
