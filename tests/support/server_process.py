"""A server of a test's own, to be killed, stopped, restarted, and robbed of its last writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.asyncio import Redis

from forebay.broker import server_arguments
from forebay.broker_binary import BrokerBinary
from forebay.paths import socket_path
from service.die_with_parent import command_line
from support.waiting import wait_until


class ServerProcess:
    """A server on a Unix socket in `directory`, with an append-only file as the broker has one.

    `options` are server options on top of that, or in place of the broker's. Everything here
    returns once it is done.
    """

    def __init__(
        self, directory: Path, binary: BrokerBinary, options: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.url = f"unix://{socket_path(directory)}"
        self._arguments = server_arguments(binary, directory)
        for name, value in (options or {}).items():
            self._arguments += [f"--{name}", value]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, directory: Path, binary: BrokerBinary, options: Mapping[str, str] | None = None
    ) -> ServerProcess:
        """Start a server and wait until it answers."""
        server = cls(directory, binary, options)
        server.restart()
        return server

    @property
    def pid(self) -> int:
        """The process id of the server that runs now."""
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """Start on what is in the directory, after `kill` or `end`."""
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command_line(self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert wait_until(self.answers), (self.directory / "server.log").read_text()

    def answers(self) -> bool:
        """Whether the server is up and has loaded its data."""
        try:
            return bool(self.command("PING"))
        except redis.RedisError:
            return False

    def command(self, *arguments: str | int) -> Any:
        """Send one command, over a connection of its own."""
        with redis.Redis.from_url(self.url, protocol=2) as client:
            return client.execute_command(*arguments)

    def kill(self) -> None:
        """SIGKILL: what it wrote is in the file, and what it only held in memory is not."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def stop(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers any more."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT: what came in meanwhile is carried out now."""
        os.kill(self.pid, signal.SIGCONT)

    def aof_size(self) -> int:
        """How long the append-only file is, in bytes."""
        return self._aof().stat().st_size

    def truncate_aof(self, num_bytes: int) -> None:
        """Cut off the end of a dead server's append-only file: the second that a crash loses.

        A command or script that is cut in the middle is lost as a whole.
        """
        os.truncate(self._aof(), self.aof_size() - num_bytes)

    def _aof(self) -> Path:
        files = (self.directory / "appendonlydir").glob("*.incr.aof")
        return max(files, key=lambda path: int(path.name.split(".")[-3]))


@contextmanager
def server_process(
    binary: BrokerBinary, options: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A running server in a directory of its own, both gone afterwards."""
    # Not pytest's own directory: its path may be too long for a socket.
    directory = Path(tempfile.mkdtemp(prefix="forebay-test-"))
    server = ServerProcess(directory, binary, options)
    try:
        server.restart()
        yield server
    finally:
        server.end()
        shutil.rmtree(directory)


async def restart_under(client: Redis, server: ServerProcess) -> None:
    """Restart a server that was killed, without its old connections in a client's hands."""
    server.restart()
    await client.connection_pool.disconnect()
