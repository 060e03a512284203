"""Processes that can be killed around any of their Redis calls, and replies that get lost.

A `FaultyProcess` stands for a process that talks to Redis: every connection whose URL names it
(`unix:///path?client_name=NAME`) belongs to it. Faults strike below redis-py, so that the code
under test is the production code, from its retries to its connection pools:

    kill_before   the call never reaches the server, and the process is dead
    kill_after    the server has carried it out, its reply is never seen, and the process is dead
    drop_reply    the server has carried it out, the connection breaks, and the process lives on

A dead process sends nothing any more, from no connection and no thread; its open connections are
closed, as the kernel would.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from typing import Any, Literal, TypeAlias

from redis.asyncio.connection import UnixDomainSocketConnection
from redis.exceptions import AuthenticationError, ConnectionError, ResponseError

from wire.connection import CONNECTION_CLASSES
from wire.scripts import _sources

Strike: TypeAlias = Literal["kill_before", "kill_after", "drop_reply"]
STRIKES: tuple[Strike, ...] = ("kill_before", "kill_after", "drop_reply")

CONNECT = "connect"
"""The kind of call that opens a connection, with the client's greeting in it."""

_KEY = re.compile(rb"\}:([a-z_]+)")


class ProcessDied(AuthenticationError):
    """What a dead process' calls end in: an error that nobody tries to ride out."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Strikes the `nth` call of a `kind` that a process makes, and the `times` - 1 after it."""

    kind: str
    nth: int
    strike: Strike
    times: int = 1

    def hits(self, kind: str, nth: int) -> bool:
        """Whether this call is struck."""
        return kind == self.kind and self.nth <= nth < self.nth + self.times


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a process makes: the `nth` of its kind."""

    kind: str
    nth: int
    strike: Strike | None


class FaultyProcess:
    """One process, from its start to its end or death.

    `on_death` is called in the event loop that made this object. `on_send` hears of each call that
    is sent, in whatever thread sends it.
    """

    def __init__(
        self,
        name: str,
        faults: Sequence[Fault] = (),
        *,
        on_death: Callable[[], None],
        on_send: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self.name = name
        self.num_calls: Counter[str] = Counter()
        self.num_in_flight: Counter[str] = Counter()
        self.is_dead = False
        self.struck: set[tuple[str, int]] = set()
        self._faults = faults
        self._on_death = on_death
        self.on_send = on_send
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._connections: weakref.WeakSet[_FaultyConnection] = weakref.WeakSet()
        _processes[name] = self

    def begin(self, kind: str) -> Call:
        """Count a call that is about to be made, and decide what shall go wrong with it."""
        self.check_alive()
        with self._lock:
            self.num_calls[kind] += 1
            self.num_in_flight[kind] += 1
            nth = self.num_calls[kind]
        strikes = (fault.strike for fault in self._faults if fault.hits(kind, nth))
        return Call(kind, nth, next(strikes, None))

    def end(self, call: Call) -> None:
        """A call has its reply, or will never have one."""
        with self._lock:
            self.num_in_flight[call.kind] -= 1

    def strike_before(self, call: Call) -> None:
        """The call is about to be sent. Raises ProcessDied."""
        if call.strike == "kill_before":
            self.struck.add((call.kind, call.nth))
            self.die()
        self.check_alive()

    def strike_after(self, call: Call) -> bool:
        """The call was carried out. Returns whether its reply gets lost. Raises ProcessDied."""
        if call.strike == "kill_after":
            self.die()
        if call.strike in ("kill_after", "drop_reply"):
            self.struck.add((call.kind, call.nth))
        self.check_alive()
        return call.strike == "drop_reply"

    def die(self) -> None:
        """Kill it; from any thread."""
        with self._lock:
            if self.is_dead:
                return
            self.is_dead = True
            connections = list(self._connections)
        for connection in connections:
            connection.cut()
        self._loop.call_soon_threadsafe(self._on_death)

    def check_alive(self) -> None:
        """Raise ProcessDied for one that is dead."""
        if self.is_dead:
            raise ProcessDied(f"process {self.name} was killed")

    def own(self, connection: _FaultyConnection) -> None:
        """Take a connection along into death."""
        with self._lock:
            self._connections.add(connection)
        self.check_alive()


_processes: weakref.WeakValueDictionary[str, FaultyProcess] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def faulty_connections() -> Iterator[None]:
    """Inside, connections over Unix sockets belong to the process that their URL names, if any."""
    usual = CONNECTION_CLASSES[UnixDomainSocketConnection]
    CONNECTION_CLASSES[UnixDomainSocketConnection] = type(
        "FaultyUnixConnection", (_FaultyConnection, usual), {}
    )
    try:
        yield
    finally:
        CONNECTION_CLASSES[UnixDomainSocketConnection] = usual


class _FaultyConnection:
    """In front of a redis-py connection class: counts its calls, and strikes where it shall."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._process = _processes.get(options.get("client_name") or "")
        self._is_greeting = False
        self._names: list[str] = []
        self._call: Call | None = None
        self._transport: asyncio.BaseTransport | None = None
        self._owner_loop: asyncio.AbstractEventLoop | None = None

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        if self._process is None or self.is_connected:  # type: ignore[attr-defined]
            await super().connect_check_health(*args, **options)  # type: ignore[misc]
            return
        call = self._process.begin(CONNECT)
        try:
            self._process.strike_before(call)
            self._is_greeting = True
            await super().connect_check_health(*args, **options)  # type: ignore[misc]
            await self._strike_after(self._process, call)
        finally:
            self._is_greeting = False
            self._process.end(call)

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[misc]
        self._owner_loop = asyncio.get_running_loop()
        self._transport = self._writer.transport  # type: ignore[attr-defined]
        if self._process is not None:
            self._process.own(self)

    def pack_command(self, *args: Any) -> Any:
        if self._process is not None:
            self._names.append(_name(args))
        return super().pack_command(*args)  # type: ignore[misc]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        process, names, self._names = self._process, self._names, []
        if process is None or self._is_greeting:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
            return
        self._end_call(process)  # one whose reader was cancelled
        self._call = process.begin(" + ".join(dict.fromkeys(names)))
        try:
            process.strike_before(self._call)
            process.on_send(self._call.kind)
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except BaseException:
            self._end_call(process)
            process.check_alive()
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        process, call = self._process, self._call
        if process is None or self._is_greeting:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        try:
            reply = await super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError:
            # An answer like any other; the server has dealt with the call.
            if call is not None:
                await self._strike_after(process, call)
            raise
        except Exception:
            process.check_alive()
            raise
        finally:
            self._end_call(process)
        # Of a pipeline, the first reply: the server works off at once what came in one piece.
        if call is not None:
            await self._strike_after(process, call)
        return reply

    def cut(self) -> None:
        """Close the connection at once; from any thread."""
        transport, loop = self._transport, self._owner_loop
        if isinstance(transport, asyncio.WriteTransport) and loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed, and so is the connection
                loop.call_soon_threadsafe(transport.abort)

    def _end_call(self, process: FaultyProcess) -> None:
        if self._call is not None:
            process.end(self._call)
        self._call = None

    async def _strike_after(self, process: FaultyProcess, call: Call) -> None:
        if process.strike_after(call):
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise ConnectionError("the connection broke before the reply was read")


def _name(args: Sequence[Any]) -> str:
    """What a command is and which keys it is about: `HMGET request`, `EVALSHA commit`."""
    command = str(args[0]).upper()
    if command == "EVALSHA":
        return f"{command} {_script_names().get(str(args[1]), '?')}"
    for arg in args[1:]:
        data = arg if isinstance(arg, bytes) else str(arg).encode()
        if found := _KEY.search(data[:300]):
            return f"{command} {found[1].decode()}"
    return command


@cache
def _script_names() -> dict[str, str]:
    return {sha1(source.encode()).hexdigest(): name for name, source in _sources().items()}
