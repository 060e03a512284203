"""Where a rank is reached: `127.0.0.1:0`, `[::1]:7001` or `unix:/path/of/a/socket`.

Port 0 lets the system choose. An address that stands for all interfaces is refused, since it names
no place that a peer could connect to, and would open more than was meant.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass

from cache.transfer.deadline import Deadline
from cache.transfer.failures import TransferFailed
from wire.errors import ConfigError

LOOPBACK = "127.0.0.1:0"

_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Address:
    """`host` and `port`, or the `path` of a Unix socket."""

    host: str
    port: int
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigError for what is not an address, host names among it."""
        if text.startswith(_UNIX):
            if not os.path.isabs(path := text.removeprefix(_UNIX)):
                raise ConfigError(f"{text}: the path of a socket must be absolute")
            return cls("", 0, path)
        host, _, port = text.rpartition(":")
        try:
            address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
            number = int(port)
        except ValueError as error:
            raise ConfigError(
                f"{text!r} is not an address like {LOOPBACK} or unix:/path"
            ) from error
        if address.is_unspecified or not 0 <= number < 65536:
            raise ConfigError(f"{text}: name one interface, and a port from 0 to 65535")
        return cls(str(address), number)

    def __str__(self) -> str:
        if self.path is not None:
            return _UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self, backlog: int) -> tuple[socket.socket, Address]:
        """A listening socket, and where it is reached. Raises OSError."""
        with contextlib.ExitStack() as unfinished:
            listener = unfinished.enter_context(self._socket())
            if self.path is not None:
                _remove_abandoned(self.path)
                listener.bind(self.path)
                os.chmod(self.path, stat.S_IRUSR | stat.S_IWUSR)
                bound = self
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self.host, self.port))
                bound = Address(self.host, listener.getsockname()[1])
            listener.listen(backlog)
            unfinished.pop_all()
            return listener, bound

    def connect(self, deadline: Deadline) -> socket.socket:
        """Raises TransferFailed if nobody answers."""
        with contextlib.ExitStack() as unfinished:
            try:
                connected = unfinished.enter_context(self._socket())
                connected.settimeout(deadline.remaining_s())
                connected.connect(self.path or (self.host, self.port))
                connected.settimeout(None)
            except OSError as error:
                raise TransferFailed(f"{self} cannot be reached: {error}") from error
            unfinished.pop_all()
            return connected

    def _socket(self) -> socket.socket:
        if self.path is not None:
            return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


def _remove_abandoned(path: str) -> None:
    """A socket at which nobody listens any more is what a killed process left behind."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # not ours to remove: binding will fail and say so
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
