"""redis-py's connections, so that cancelling a task that uses one always works.

With a socket timeout, redis-py sends through `asyncio.wait_for`, which before Python 3.12 drops a
cancellation that comes in the moment in which the sending ends (CPython issue 86296): the task
that was to be cancelled goes on for ever. `asyncio.timeout` has no such gap.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import TimeoutError as RedisTimeoutError


class _CancellableSend:
    """In front of a redis-py connection class: bounds a send without `asyncio.wait_for`."""

    socket_timeout: float | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        timeout_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(timeout_s):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError as error:
            raise RedisTimeoutError("Timeout writing to socket") from error
        finally:
            self.socket_timeout = timeout_s


class _TCPConnection(_CancellableSend, Connection):
    pass


class _TLSConnection(_CancellableSend, SSLConnection):
    pass


class _UnixConnection(_CancellableSend, UnixDomainSocketConnection):
    pass


CONNECTION_CLASSES: dict[type, type] = {
    Connection: _TCPConnection,
    SSLConnection: _TLSConnection,
    UnixDomainSocketConnection: _UnixConnection,
}
"""What to use in place of each of redis-py's connection classes."""
