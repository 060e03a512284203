"""Logs: JSON where a machine reads them, text where a person does, passwords in neither."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from service import logs
from wire.redaction import mask_passwords


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:secret@host", "rediss://user:***@host"),
        ("at redis://u:s/e@c@host now", "at redis://u:***@host now"),
        ("unix:///run/redis.sock?password=secret&db=1", "unix:///run/redis.sock?password=***&db=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("mail me: a@b.example", "mail me: a@b.example"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, masked: str) -> None:
    assert mask_passwords(text) == masked


def test_elsewhere_than_on_a_terminal_an_event_is_a_json_line() -> None:
    stream = io.StringIO()
    logs.configure(level="info", log_format="auto", service="scheduler", stream=stream)
    structlog.get_logger().info("group_lost", group_id="g1", server="redis://:secret@host")
    event = json.loads(stream.getvalue())
    assert event["event"] == "group_lost"
    assert event["service"] == "scheduler"
    assert event["group_id"] == "g1"
    assert event["server"] == "redis://:***@host"


def test_on_a_terminal_an_event_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    logs.configure(level="info", log_format="auto", service="scheduler", stream=stream)
    structlog.get_logger().info("group_lost", group_id="g1")
    assert "group_lost" in stream.getvalue()
    assert "group_id=g1" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_what_is_below_the_level_is_not_logged() -> None:
    stream = io.StringIO()
    logs.configure(level="warning", log_format="json", service="scheduler", stream=stream)
    structlog.get_logger().info("nothing_special")
    assert stream.getvalue() == ""


def test_a_traceback_hides_passwords_too() -> None:
    stream = io.StringIO()
    logs.configure(level="info", log_format="json", service="scheduler", stream=stream)
    try:
        raise ValueError("cannot use redis://:secret@host")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError" in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_libraries_log_in_the_same_form() -> None:
    stream = io.StringIO()
    logs.configure(level="info", log_format="json", service="scheduler", stream=stream)
    logging.getLogger("asyncio").warning("slow: %s", "redis://:secret@host")
    event = json.loads(stream.getvalue())
    assert event["logger"] == "asyncio"
    assert event["event"] == "slow: redis://:***@host"
