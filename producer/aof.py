"""What a server's append-only file has, from what the server says about it; no I/O here.

Redis 7.2 and Valkey say it themselves (WAITAOF). On Redis 7.0 it follows from INFO, of which
`AofWatch` judges one after another, polled at any pace:

    write ── A: it is in the file, no fsync runs ── 2 s ── B ── C: no fsync runs ⇒ it is on disk

A. The file has grown past where it would end with the write (size plus buffer, in the same
   pipeline as the write). No fsync runs that may have begun before.
B. With `appendfsync everysec` the server begins an fsync when a second of its clock is over and
   none runs, before it sends out the replies of an iteration of its event loop, also when nothing
   is written any more. Its clock goes on by ticks of at most a second. So by the time B is
   answered, 2 s after A, one has begun that has the write, if not before.
C. None runs: that one has ended. Had it failed, `aof_last_write_status` would say so.

A rewrite of the file, or a restart, makes sizes incomparable: then one has to write again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from wire.errors import ConfigError

CONFIG_NAMES = ("appendfsync", "no-appendfsync-on-rewrite")
SETTLING_S = 2.0


@dataclass(frozen=True, slots=True)
class AofPolicy:
    """How a server keeps its append-only file: how to find out what is in it.

    `appendfsync` is None where the server does not let us ask.
    """

    has_waitaof: bool
    appendfsync: str | None

    @classmethod
    def of(
        cls, info: Mapping[str, Any], config: Mapping[str, str] | None, *, has_waitaof: bool
    ) -> Self:
        """The policy in INFO and (if we may see it) CONFIG.

        Raises ConfigError if it promises nothing, or we cannot know.
        """
        if not info.get("aof_enabled"):
            raise ConfigError(
                "durable=True needs a server with an append-only file; set appendonly yes there, "
                "or submit without durable"
            )
        appendfsync = None if config is None else config["appendfsync"]
        if appendfsync == "no":
            raise ConfigError(
                "durable=True needs a server that writes its append-only file to disk in time; set "
                "appendfsync everysec (or always) there, or submit without durable"
            )
        if has_waitaof or appendfsync == "always":
            return cls(has_waitaof, appendfsync)
        if config is None:
            raise ConfigError(
                "durable=True needs Redis 7.2 or Valkey, or leave to ask an older server for its "
                "appendfsync (ACL +config|get); or submit without durable"
            )
        if config["no-appendfsync-on-rewrite"] == "yes":
            raise ConfigError(
                "durable=True needs a server that goes on writing to disk while it rewrites its "
                "append-only file; set no-appendfsync-on-rewrite no there, or submit without "
                "durable"
            )
        return cls(has_waitaof, appendfsync)


@dataclass(frozen=True, slots=True)
class AofSight:
    """What one INFO says of the append-only file; asked for and answered when, by our clock."""

    asked_s: float
    answered_s: float
    life: tuple[str, int]
    size_bytes: int
    buffered_bytes: int
    is_syncing: bool
    is_healthy: bool

    @classmethod
    def of(cls, info: Mapping[str, Any], *, asked_s: float, answered_s: float) -> Self:
        """Read INFO's sections `server` and `persistence`."""
        return cls(
            asked_s=asked_s,
            answered_s=answered_s,
            life=(str(info["run_id"]), int(info["aof_base_size"])),
            size_bytes=int(info["aof_current_size"]),
            buffered_bytes=int(info["aof_buffer_length"]),
            is_syncing=int(info["aof_pending_bio_fsync"]) > 0,
            is_healthy=info["aof_last_write_status"] == "ok",
        )


Verdict = Literal["on disk", "wait", "write again"]


class AofWatch:
    """Judges whether a write is on disk, given what INFO said right behind it."""

    def __init__(self, behind_write: AofSight) -> None:
        self._life = behind_write.life
        self._end_bytes = behind_write.size_bytes + behind_write.buffered_bytes
        self._settled_s: float | None = None  # A and 2 s
        self._fsync_has_begun = False  # B

    def judge(self, sight: AofSight) -> Verdict:
        """Take in one more INFO, asked for after the one before was answered."""
        if sight.life != self._life:
            return "write again"
        if not sight.is_healthy:
            self._settled_s, self._fsync_has_begun = None, False
        elif self._settled_s is None:
            if sight.size_bytes >= self._end_bytes and not sight.is_syncing:
                self._settled_s = sight.answered_s + SETTLING_S
        elif self._fsync_has_begun and not sight.is_syncing:
            return "on disk"
        else:
            self._fsync_has_begun = sight.asked_s >= self._settled_s
        return "wait"
