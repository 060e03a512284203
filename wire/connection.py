"""redis-py's connections, so that cancelling a task that uses one always works; and quicker.

With a socket timeout, redis-py sends through `asyncio.wait_for`, which before Python 3.12 drops a
cancellation that comes in the moment in which the sending ends (CPython issue 86296): the task
that was to be cancelled goes on for ever. `asyncio.timeout` has no such gap.

A commit has a thousand arguments: most of its cost was redis-py's way of packing them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.typing import EncodableT


class _OwnSend:
    """In front of a redis-py connection class: packs and sends what it is given."""

    socket_timeout: float | None

    def pack_command(self, *args: EncodableT) -> list[bytes]:
        """One command in the server's protocol; its first argument may be two words.

        Called by redis-py's `send_command` and, for each command of a pipeline, `pack_commands`.
        """
        first, *rest = args
        assert isinstance(first, str | bytes)
        words = [*first.split(), *rest]
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            data = word.encode() if isinstance(word, str) else word
            if isinstance(data, int | float):
                data = repr(data).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
        return [b"".join(parts)]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        timeout_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(timeout_s):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError as error:
            raise RedisTimeoutError("Timeout writing to socket") from error
        finally:
            self.socket_timeout = timeout_s


class _TCPConnection(_OwnSend, Connection):
    pass


class _TLSConnection(_OwnSend, SSLConnection):
    pass


class _UnixConnection(_OwnSend, UnixDomainSocketConnection):
    pass


CONNECTION_CLASSES: dict[type, type] = {
    Connection: _TCPConnection,
    SSLConnection: _TLSConnection,
    UnixDomainSocketConnection: _UnixConnection,
}
"""What to use in place of each of redis-py's connection classes."""
