"""Reading a start's phases from logs."""

from __future__ import annotations

from benchmarks.startup import phase_ends


def test_phases_end_with_the_first_event_of_their_kind() -> None:
    lines = [
        '{"service": "forebay", "event": "broker_started", "timestamp": "1970-01-01T00:00:01.5Z"}',
        "1/1 requests, 0 failed",
        '{"service": "worker", "event": "group joined", "timestamp": "1970-01-01T00:00:03Z"}',
        '{"service": "scheduler", "event": "group joined", "timestamp": "1970-01-01T00:00:02Z"}',
        '{"service": "worker", "event": "group joined", "timestamp": "1970-01-01T00:00:04Z"}',
    ]
    assert phase_ends(lines) == {"broker_s": 1.5, "ready_s": 3.0}
