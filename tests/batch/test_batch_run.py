"""A batch run: each row comes out once, whole and at once, whatever its neighbours are."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import (
    FakeProducer,
    FakeProgress,
    answer,
    chat_row,
    custom_ids,
    line,
    read_rows,
    text_row,
    write_rows,
)

from producer.batch import BatchOptions, BatchSummary, run_batch
from wire.errors import ConfigError, FileError, ForebayError, ServerUnreachable
from wire.messages import ErrorInfo, Request, Result, TerminalState


async def run(
    tmp_path: Path, rows: Sequence[object], producer: FakeProducer | None = None, **options: Any
) -> BatchSummary:
    source = write_rows(tmp_path / "in.jsonl", rows)
    return await run_batch(
        BatchOptions(source, str(tmp_path / "out.jsonl"), **options), producer or FakeProducer()
    )


async def test_every_row_comes_out_once_and_the_summary_adds_up(tmp_path: Path) -> None:
    producer = FakeProducer()
    summary = await run(tmp_path, [chat_row(f"r{i}") for i in range(10)], producer)

    assert sorted(custom_ids(tmp_path / "out.jsonl")) == [f"r{i}" for i in range(10)]
    assert (summary.num_rows, summary.num_succeeded, summary.num_failed) == (10, 10, 0)
    assert summary.num_prompt_tokens == 50
    assert summary.num_output_tokens == 30
    assert summary.num_cached_tokens == 40
    assert summary.first_answer_s is not None
    assert 0 < summary.first_answer_s <= summary.wall_s
    assert summary.output_tokens_per_s == pytest.approx(30 / summary.wall_s)
    assert {request.priority for request in producer.seen} == {"batch"}
    assert len({request.request_id for request in producer.seen}) == 10


async def test_request_ids_differ_between_runs_of_one_file(tmp_path: Path) -> None:
    one, other = FakeProducer(), FakeProducer()
    await run(tmp_path, [chat_row()], one)
    await run(tmp_path, [chat_row()], other, restart=True)
    assert one.seen[0].request_id != other.seen[0].request_id


async def test_rows_are_written_in_completion_order_each_before_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    found: list[list[str]] = []

    def note_output(request: Request) -> Result:
        found.append(custom_ids(out))
        return answer(request)

    await run(tmp_path, [chat_row(i) for i in "abc"], FakeProducer(answer=note_output))
    assert found == [[], ["c"], ["c", "b"]]
    assert custom_ids(out) == ["c", "b", "a"]


async def test_bad_rows_fail_alone(tmp_path: Path) -> None:
    progress = FakeProgress()
    source = write_rows(
        tmp_path / "in.jsonl",
        [
            chat_row("good"),
            b"not json",
            b"",
            b" \r",
            chat_row("warm", temperature=-1),
            b'{"custom_id": "\xff"}',
            text_row("good too"),
        ],
    )
    out = tmp_path / "out.jsonl"
    summary = await run_batch(BatchOptions(source, str(out)), FakeProducer(), progress)

    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == [None, "warm", None, "good too", "good"]
    assert [row["error"] and row["error"]["line"] for row in rows] == [2, 5, 6, None, None]
    assert all((row["response"] is None) != (row["error"] is None) for row in rows)
    assert rows[1]["error"]["param"] == "temperature"
    assert (summary.num_rows, summary.num_succeeded) == (5, 2)
    assert summary.failed_by_code == {"invalid_request": 3}
    assert [failure.row_number for failure in progress.failures] == [2, 5, 6]
    assert progress.done == (2, 3, 10, 6)


async def test_requests_that_end_without_an_answer_are_failed_rows(tmp_path: Path) -> None:
    outcomes: dict[str, tuple[TerminalState, ErrorInfo | None]] = {
        "long": ("failed", ErrorInfo("context_length_exceeded", "too long", "messages")),
        "late": ("expired", None),
    }

    def outcome(request: Request) -> Result:
        state, error = outcomes[request.model or ""]
        return replace(answer(request), state=state, error=error)

    summary = await run(
        tmp_path,
        [chat_row("a", model="long"), chat_row("b", model="late")],
        FakeProducer(answer=outcome),
    )
    late, long = read_rows(tmp_path / "out.jsonl")
    assert long["error"] == {
        "code": "context_length_exceeded",
        "message": "too long",
        "param": "messages",
        "line": 1,
    }
    assert late["error"]["code"] == "expired"
    assert late["partial"]["choices"][0]["message"]["content"] == "an answer"
    assert summary.failed_by_code == {"context_length_exceeded": 1, "expired": 1}
    assert summary.first_answer_s is None


async def test_failed_rows_go_to_the_errors_file_if_there_is_one(tmp_path: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    await run(tmp_path, [chat_row("a"), chat_row("b", n=2)], errors=str(errors))
    assert custom_ids(tmp_path / "out.jsonl") == ["a"]
    assert custom_ids(errors) == ["b"]


async def test_of_rows_with_one_custom_id_the_first_is_run(tmp_path: Path) -> None:
    producer = FakeProducer()
    await run(tmp_path, [chat_row("a"), chat_row("b"), chat_row("a", seed=1)], producer)
    refused, *answered = read_rows(tmp_path / "out.jsonl")
    assert refused["error"]["line"] == 3
    assert refused["error"]["param"] == "custom_id"
    assert refused["error"]["code"] == "duplicate_custom_id"
    assert "that of row 1 already" in refused["error"]["message"]
    assert sorted(row["custom_id"] for row in answered) == ["a", "b"]
    assert len(producer.seen) == 2


async def test_a_line_above_the_limit_is_skipped_without_being_held(tmp_path: Path) -> None:
    rows = [chat_row("a"), b"x" * 10_000_000, chat_row("b")]
    summary = await run(tmp_path, rows)
    [failed] = [row for row in read_rows(tmp_path / "out.jsonl") if row["error"]]
    assert "10000000 bytes long; the limit is 8388608" in failed["error"]["message"]
    assert failed["error"]["line"] == 2
    assert summary.num_succeeded == 2


@pytest.mark.parametrize("limit", [199, 200])
async def test_the_limit_counts_the_line_without_its_break(tmp_path: Path, limit: int) -> None:
    exact = line(chat_row()).ljust(200)
    summary = await run(tmp_path, [exact, exact.replace(b'"a"', b'"b"')], max_line_bytes=limit)
    assert summary.num_succeeded == (2 if limit == 200 else 0)


async def test_a_byte_order_mark_windows_breaks_and_no_last_break_do_no_harm(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf"
        + line(chat_row("a"))
        + b"\r\n"
        + line(chat_row("b"))
        + b"\r\n\r\n"
        + line(chat_row("c"))
    )
    await run_batch(BatchOptions(str(source), str(tmp_path / "out.jsonl")), FakeProducer())
    assert sorted(custom_ids(tmp_path / "out.jsonl")) == ["a", "b", "c"]


async def test_an_empty_input_is_a_run_of_no_rows(tmp_path: Path) -> None:
    summary = await run(tmp_path, [])
    assert summary.num_rows == 0
    assert read_rows(tmp_path / "out.jsonl") == []


async def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    producer = FakeProducer()
    await run(tmp_path, [chat_row(f"r{i}") for i in range(50)], producer, max_in_flight=7)
    assert producer.most_in_flight == 7


async def test_progress_estimates_the_total_and_ends_exact(tmp_path: Path) -> None:
    progress = FakeProgress()
    rows = [chat_row(f"r{i:04}") for i in range(1000)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    await run_batch(BatchOptions(source, str(tmp_path / "out.jsonl")), FakeProducer(), progress)
    assert all(total == 1000 for _, total in progress.reads)
    assert progress.reads[-1] == (1000, 1000)
    assert progress.done == (1000, 0, 5000, 3000)


async def test_progress_knows_no_total_of_a_pipe_before_its_end(tmp_path: Path) -> None:
    receiver, sender = os.pipe()
    os.write(sender, line(chat_row("a")) + b"\n" + line(chat_row("b")))
    os.close(sender)
    progress = FakeProgress()
    options = BatchOptions(f"/dev/fd/{receiver}", str(tmp_path / "out.jsonl"))
    await run_batch(options, FakeProducer(), progress)
    os.close(receiver)
    assert progress.reads == [(1, None), (2, None), (2, 2)]


async def test_a_file_of_refused_rows_leaves_the_event_loop_room(tmp_path: Path) -> None:
    num_turns = 0

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    await run(tmp_path, [b"x" * 1000] * 1000)
    counting.cancel()
    assert num_turns > 10


async def test_a_producer_that_loses_a_request_is_not_taken_for_success(tmp_path: Path) -> None:
    class Forgetful(FakeProducer):
        async def submit_many(self, requests: Any, **options: Any) -> Any:
            async for request in requests:
                if len(self.seen) != 1:
                    yield answer(request)
                self.seen.append(request)

    with pytest.raises(ForebayError, match="1 rows got no result, the first of them row 2"):
        await run(tmp_path, [chat_row(i) for i in "abc"], Forgetful())


async def test_rows_written_before_the_server_went_away_stay(tmp_path: Path) -> None:
    def vanish(request: Request) -> Result:
        if request.model == "last":
            raise ServerUnreachable("gone")
        return answer(request)

    with pytest.raises(ServerUnreachable):
        await run(
            tmp_path,
            [chat_row("a", model="last"), chat_row("b"), chat_row("c")],
            FakeProducer(answer=vanish),
        )
    assert custom_ids(tmp_path / "out.jsonl") == ["c", "b"]


async def test_a_cancelled_run_leaves_whole_lines(tmp_path: Path) -> None:
    class Stuck(FakeProducer):
        def __init__(self) -> None:
            super().__init__()
            self.stuck = asyncio.Event()
            self.closed = False

        async def submit_many(self, requests: Any, **options: Any) -> Any:
            try:
                async for request in requests:
                    yield answer(request)
                self.stuck.set()
                await asyncio.Event().wait()
            finally:
                self.closed = True

    producer = Stuck()
    task = asyncio.create_task(run(tmp_path, [chat_row("a"), chat_row("b")], producer))
    await producer.stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    out = tmp_path / "out.jsonl"
    assert custom_ids(out) == ["a", "b"]
    assert producer.closed


async def test_a_failing_disk_ends_the_run_with_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    num_bytes_good = 1000

    def fail_soon(fd: int, data: bytes) -> int:
        nonlocal num_bytes_good
        if num_bytes_good == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        num_written = write(fd, data[:num_bytes_good])
        num_bytes_good -= num_written
        return num_written

    with monkeypatch.context() as patch:
        patch.setattr("producer.batch.writer.os.write", fail_soon)
        with pytest.raises(ForebayError, match=r"Input/output error; the rows written before"):
            await run(tmp_path, [chat_row(f"r{i}") for i in range(10)])
    assert 0 < len(read_rows(tmp_path / "out.jsonl")) < 10


async def test_a_device_that_takes_nothing_ends_the_run(
    tmp_path: Path,
) -> None:
    rows = [chat_row("a"), chat_row("b", n=2), chat_row("c")]
    with pytest.raises(ForebayError, match="cannot write to /dev/full: No space left"):
        await run(tmp_path, rows, errors="/dev/full")
    assert custom_ids(tmp_path / "out.jsonl") == ["a"]  # submitted before, so still awaited


async def test_a_read_error_ends_the_input_and_keeps_what_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from producer.batch.reader import Line, LineReader

    whole = LineReader.lines

    async def breaks_off(self: LineReader) -> AsyncIterator[Line]:
        async for each in whole(self):
            if each.number == 3:
                raise ForebayError("cannot read in.jsonl further: Input/output error")
            yield each

    monkeypatch.setattr(LineReader, "lines", breaks_off)
    with pytest.raises(ForebayError, match="Input/output error"):
        await run(tmp_path, [chat_row(i) for i in "abcd"])
    assert sorted(custom_ids(tmp_path / "out.jsonl")) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": "missing.jsonl"}, "cannot read the input .*missing.jsonl: No such file"),
        ({"input": "."}, "cannot read the input .*: Is a directory"),
        ({"output": "no/such/out.jsonl"}, "cannot write the results to .*: No such file"),
        ({"output": "."}, "cannot write the results to .*: Is a directory"),
        ({"errors": "no/such/err.jsonl"}, "cannot write the failed rows to .*: No such file"),
        ({"output": "in.jsonl", "restart": True}, "is the input and would be written to"),
        ({"errors": "in.jsonl", "restart": True}, "is the input and would be written to"),
        ({"errors": "out.jsonl"}, "is to take both results and failed rows"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_anything_starts(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [chat_row()])
    before = (tmp_path / "in.jsonl").read_bytes()
    paths: dict[str, Any] = {"input": source, "output": str(tmp_path / "out.jsonl")}
    for name, value in options.items():
        paths[name] = value if isinstance(value, bool) else str(tmp_path / value)
    producer = FakeProducer()
    with pytest.raises((ConfigError, FileError), match=said):
        asyncio.run(run_batch(BatchOptions(**paths), producer))
    assert producer.seen == []
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_bounds_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_in_flight is 0"):
        BatchOptions("in", "out", max_in_flight=0)


def test_one_cannot_start_over_and_go_on_at_once() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        BatchOptions("in", "out", restart=True, retry_failed=True)
