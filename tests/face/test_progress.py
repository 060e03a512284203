"""What a batch run shows: a bar for a person at a terminal, lines now and then for a log."""

from __future__ import annotations

import io

import pytest

from forebay.cli import progress
from forebay.cli.progress import Progress, summary_lines
from producer.batch import BatchSummary, RowFailure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def summary(**changes: object) -> BatchSummary:
    values: dict[str, object] = {
        "num_rows": 3,
        "num_resumed": 0,
        "num_resumed_failed": 0,
        "num_succeeded": 3,
        "failed_by_code": {},
        "num_prompt_tokens": 30,
        "num_output_tokens": 100,
        "num_cached_tokens": 16,
        "wall_s": 2.0,
        "first_answer_s": 0.5,
        "output": "out.jsonl",
        "errors": None,
    }
    return BatchSummary(**values | changes)  # type: ignore[arg-type]


def test_a_terminal_gets_a_bar_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_EVERY_S", 0.0)
    stream = Terminal()
    with Progress(stream) as shown:
        shown.on_read(1, 4)
        shown.on_done(1, 0, 10, 20)
        shown.on_done(4, 0, 40, 80)
    assert "4/4" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()


def test_elsewhere_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = [100.0]
    monkeypatch.setattr("forebay.cli.progress.time.monotonic", lambda: clock[0])
    with Progress(stream) as shown:
        shown.on_read(1, 4)
        for num_done in (1, 2):
            clock[0] += 4
            shown.on_done(num_done, 0, 10, 80 * num_done)
    assert stream.getvalue() == (
        "2/4 requests, 0 failed, 0.2 requests/s, 20 tokens/s, about 8 s left\n"
    )


def test_what_earlier_runs_did_counts_as_done_but_not_for_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    clock = [100.0]
    monkeypatch.setattr("forebay.cli.progress.time.monotonic", lambda: clock[0])
    with Progress(stream) as shown:
        shown.on_resumed(1190, 10)
        shown.on_read(1201, 1300)
        clock[0] += 10
        shown.on_done(50, 0, 10, 1000)
        shown.on_notice("paused: the disk is full")
    assert stream.getvalue() == (
        "resumed: 1,200 rows were done already, 10 of them without an answer "
        "(--retry-failed runs these again)\n"
        "1250/1300 requests (1200 resumed), 0 failed, 5.0 requests/s, 100 tokens/s, "
        "about 10 s left\n"
        "paused: the disk is full\n"
    )


def test_a_bar_starts_where_earlier_runs_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_EVERY_S", 0.0)
    stream = Terminal()
    with Progress(stream) as shown:
        shown.on_resumed(1, 0)
        shown.on_read(2, 4)
        shown.on_done(1, 0, 10, 20)
        assert "2/4" in stream.getvalue()
    assert "resumed: 1 row was done already\n" in stream.getvalue()


def test_of_many_failures_the_first_are_shown() -> None:
    stream = io.StringIO()
    with Progress(stream) as shown:
        for row in range(1, 100):
            shown.on_failure(RowFailure(row, f"id-{row}", "invalid_request", "no prompt"))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("failed: row 1 ")
    assert lines[-1] == "further failures are only written to the file"


def test_the_summary_says_what_came_of_the_run() -> None:
    text = "\n".join(summary_lines(summary()))
    assert "3: 3 answered, 0 failed" in text
    assert "30 in (16 cached), 100 out, 50.0 out/s" in text
    assert "2.0 s, the first answer after 0.5 s" in text
    assert "out.jsonl" in text


def test_the_summary_tells_what_was_done_before() -> None:
    [requests, *_] = summary_lines(summary(num_rows=10, num_resumed=7))
    assert requests == "requests  10: 7 done before, 3 answered, 0 failed"
    [requests, *_] = summary_lines(summary(num_rows=10, num_resumed=7, num_resumed_failed=2))
    assert requests == "requests  10: 7 done before (2 of them failed), 3 answered, 0 failed"


def test_the_summary_counts_failures_by_their_kind() -> None:
    failed = {"invalid_request": 2, "expired": 1}
    lines = summary_lines(
        summary(num_succeeded=0, failed_by_code=failed, first_answer_s=None, errors="bad.jsonl")
    )
    assert "3 failed (1 expired, 2 invalid_request)" in lines[0]
    assert lines[-1].endswith("bad.jsonl")
