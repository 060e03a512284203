"""The network between a service and its server, at a test's command: slow, cut, lossy or silent.

    service ── redis://127.0.0.1:PORT ── TcpProxy ── Unix socket ── server

A proxy for each service makes each of them fail alone. It runs in a thread of its own, so that a
test which blocks its event loop holds up nobody. What it may do to bytes:

    cut             both ends see their connections end
    lose_replies    a command is carried out, then its connection ends in place of the reply
    trap_reply      the same for one command, which the test picks; its connection stays silent
    hold            nothing passes for a while, and all of it later: what TCP makes of a bad line
    swallow         what passes is gone, and nobody is told: half open, until `heal` cuts it
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024


class ReplyTrap:
    """Lies in wait for one command; springs when the command was carried out."""

    def __init__(self, matches: Callable[[bytes], bool]) -> None:
        self.matches = matches
        self._sprung = threading.Event()

    @property
    def is_sprung(self) -> bool:
        """Whether it has a reply, which nobody else will see."""
        return self._sprung.is_set()

    def wait(self, timeout_s: float = 10.0) -> None:
        """Wait until the command was carried out."""
        assert self._sprung.wait(timeout_s), "no such command came by, or it was refused"

    def spring(self) -> None:
        """Called by the proxy when it holds the reply."""
        self._sprung.set()


class TcpProxy:
    """Listens on the loopback interface while it is entered; `socket` is the server's.

    `seed` decides which replies are lost. Attributes may be set at any time, from any thread.
    """

    def __init__(self, socket: str, *, seed: int = 0) -> None:
        self._socket = socket
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tcp_proxy", daemon=True)
        self._listening = threading.Event()
        self._closing = asyncio.Event()
        self._passable = asyncio.Event()
        self._links: set[_Link] = set()
        self._traps: list[ReplyTrap] = []
        self._swallowing = False
        self.port = 0
        self.delay_s = 0.0
        self.reply_loss = 0.0
        self.num_lost_replies = 0

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all connections."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        """Where a service finds its server."""
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """End all connections; new ones are let through."""
        self._do(self._cut)

    def lose_replies(self, share: float) -> None:
        """From now on, lose this share of what comes from the server."""
        self.reply_loss = share

    def trap_reply(self, matches: Callable[[bytes], bool]) -> ReplyTrap:
        """Keep the reply to the next command whose bytes match, if it is no error."""
        trap = ReplyTrap(matches)
        self._traps.append(trap)
        return trap

    def hold(self) -> None:
        """Let nothing through, and keep it."""
        self._do(self._passable.clear)

    def swallow(self) -> None:
        """Let nothing through, and throw it away."""
        self._swallowing = True

    def heal(self) -> None:
        """Be a good line again; connections that have lost bytes end, as they must."""
        self._swallowing = False
        self.delay_s = self.reply_loss = 0.0
        self._do(self._heal)

    def _do(self, action: Callable[[], None]) -> None:
        """Have it done in the proxy's thread, and return when it is."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(action)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(10)

    # In the proxy's thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._passable.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._closing.wait()
        server.close()
        self._passable.set()
        self._cut()
        await asyncio.gather(*(link.ended.wait() for link in self._links))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_unix_connection(self._socket)
        except OSError:
            writer.close()
            return
        link = _Link(writer, to_server)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump_commands(link, reader, to_server))
                pumps.create_task(self._pump_replies(link, from_server, writer))
        except* (ConnectionError, TimeoutError):
            pass
        finally:
            link.cut()
            self._links.discard(link)
            link.ended.set()

    async def _pump_commands(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            for trap in self._traps:
                if trap.matches(data):
                    link.trap = trap
            await self._pass_on(link, data, writer)
        link.cut()

    async def _pump_replies(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if link.trap is not None and self._is_caught(link.trap, data):
                continue
            # An error, such as that the script is not known yet: the command will come again.
            link.trap = None
            if self._random.random() < self.reply_loss:
                self.num_lost_replies += 1
                break
            await self._pass_on(link, data, writer)
        link.cut()

    def _is_caught(self, trap: ReplyTrap, reply: bytes) -> bool:
        if trap in self._traps and not reply.startswith(b"-"):
            self._traps.remove(trap)
            trap.spring()
        return trap.is_sprung

    async def _pass_on(self, link: _Link, data: bytes, writer: asyncio.StreamWriter) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._passable.wait()
        if self._swallowing:
            link.has_lost_bytes = True
        elif not link.has_lost_bytes:
            writer.write(data)
            await writer.drain()

    def _cut(self) -> None:
        for link in self._links:
            link.cut()

    def _heal(self) -> None:
        self._passable.set()
        for link in self._links:
            if link.has_lost_bytes:
                link.cut()


class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.trap: ReplyTrap | None = None
        self.has_lost_bytes = False
        self.ended = asyncio.Event()

    def cut(self) -> None:
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.transport.abort()
