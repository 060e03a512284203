"""Our connections put commands on the wire exactly as redis-py would."""

from __future__ import annotations

import pytest
from redis.asyncio.connection import UnixDomainSocketConnection
from redis.typing import EncodableT

from wire.connection import CONNECTION_CLASSES

USUAL = UnixDomainSocketConnection(path="/nowhere")
OURS = CONNECTION_CLASSES[UnixDomainSocketConnection](path="/nowhere")


@pytest.mark.parametrize(
    "command",
    [
        ("PING",),
        (b"GET", "ä€\N{GRINNING FACE}"),
        ("XINFO CONSUMERS", "key", b"group"),
        ("EVALSHA", "a" * 40, 1, "{p:0}", b"", "", b"\r\n\x00\xff", -7, 1.5, 2**60),
        ("SET", "key", b"x" * 100_000, "PX", 10),
    ],
)
def test_a_command_is_packed_as_redis_py_packs_it(command: tuple[EncodableT, ...]) -> None:
    assert b"".join(OURS.pack_command(*command)) == b"".join(USUAL.pack_command(*command))
