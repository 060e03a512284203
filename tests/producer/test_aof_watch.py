"""What follows from a server's words about its append-only file. No server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from producer.aof import AofPolicy, AofSight, AofWatch
from wire.errors import ConfigError

EVERYSEC = {"appendfsync": "everysec", "no-appendfsync-on-rewrite": "no"}
ALWAYS = EVERYSEC | {"appendfsync": "always"}
NO = EVERYSEC | {"appendfsync": "no"}
PAUSING = EVERYSEC | {"no-appendfsync-on-rewrite": "yes"}


@pytest.mark.parametrize(
    ("enabled", "config", "has_waitaof", "message"),
    [
        (0, EVERYSEC, True, "set appendonly yes"),
        (0, None, False, "set appendonly yes"),
        (1, NO, True, "set appendfsync everysec"),
        (1, NO, False, "set appendfsync everysec"),
        (1, None, False, r"Redis 7.2 or Valkey, or .* \+config\|get"),
        (1, PAUSING, False, "set no-appendfsync-on-rewrite no"),
    ],
)
def test_a_server_that_cannot_promise_says_how_it_could(
    enabled: int, config: dict[str, str] | None, has_waitaof: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AofPolicy.of({"aof_enabled": enabled}, config, has_waitaof=has_waitaof)


@pytest.mark.parametrize(
    ("config", "has_waitaof"),
    [(EVERYSEC, True), (EVERYSEC, False), (ALWAYS, False), (None, True), (PAUSING, True)],
)
def test_a_server_that_can_promise(config: dict[str, str] | None, has_waitaof: bool) -> None:
    policy = AofPolicy.of({"aof_enabled": 1}, config, has_waitaof=has_waitaof)
    assert policy == AofPolicy(has_waitaof, config["appendfsync"] if config else None)


BEHIND_WRITE = AofSight(0.0, 0.0, ("run", 0), 1000, 50, is_syncing=False, is_healthy=True)


def sight(at_s: float, size_bytes: int = 1050, **changes: Any) -> AofSight:
    return replace(BEHIND_WRITE, asked_s=at_s, answered_s=at_s, size_bytes=size_bytes, **changes)


def verdicts(*sights: AofSight) -> list[str]:
    watch = AofWatch(BEHIND_WRITE)
    return [watch.judge(item) for item in sights]


def test_on_disk_two_seconds_and_one_answer_after_the_write_is_in_the_file() -> None:
    assert verdicts(sight(0.1), sight(2.05), sight(2.15), sight(2.25)) == [
        "wait",
        "wait",  # not two seconds yet
        "wait",  # the fsync begins at the latest before this is answered
        "on disk",
    ]


def test_what_is_still_buffered_is_not_in_the_file() -> None:
    """Other writes may keep the buffer full for ever: the size tells whether ours is out."""
    assert verdicts(sight(0.1, 1049), sight(5), sight(6), sight(6.9)) == ["wait"] * 4
    assert verdicts(sight(0.1, buffered_bytes=9999), sight(3), sight(4))[-1] == "on disk"


def test_an_fsync_that_began_before_the_write_does_not_count() -> None:
    syncing = [sight(at_s, is_syncing=True) for at_s in (0.1, 1.0, 3.0)]
    assert verdicts(*syncing, sight(3.1), sight(4), sight(5)) == ["wait"] * 6


def test_the_fsync_after_the_write_must_have_ended() -> None:
    seen = (sight(0.1), sight(2.2), sight(2.3, is_syncing=True), sight(9, is_syncing=True))
    assert verdicts(*seen, sight(9.1)) == ["wait"] * 4 + ["on disk"]


def test_a_slow_answer_is_taken_for_the_time_at_which_it_proves_less() -> None:
    first = replace(sight(0.1), answered_s=4.0)
    second = replace(sight(4.1), answered_s=7.0)
    assert verdicts(first, second, replace(sight(7.1), answered_s=8.0)) == ["wait"] * 3


def test_after_a_failed_write_or_fsync_it_begins_anew() -> None:
    seen = (sight(0.1), sight(2.2), sight(2.3, is_healthy=False))
    assert verdicts(*seen, sight(2.4), sight(4.5)) == ["wait"] * 5
    assert verdicts(*seen, sight(2.4), sight(4.5), sight(4.6))[-1] == "on disk"


@pytest.mark.parametrize("life", [("another run", 0), ("run", 700)])
def test_after_a_restart_or_a_rewrite_sizes_say_nothing(life: tuple[str, int]) -> None:
    assert verdicts(sight(0.1), sight(2.2, life=life)) == ["wait", "write again"]
