"""A run that goes on asks a shared server for what a killed one had in flight, by the same ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import FakeProducer, FakeProgress, answer, chat_row, custom_ids, write_rows
from structlog.testing import capture_logs

from producer.batch import BatchOptions, run_batch
from producer.batch.run_id import RunNote
from wire.errors import FileError
from wire.ids import RequestId
from wire.messages import Request, Result

ROWS = [chat_row(name) for name in "abc"]


@pytest.fixture
def options(tmp_path: Path) -> BatchOptions:
    return BatchOptions(write_rows(tmp_path / "in.jsonl", ROWS), str(tmp_path / "out.jsonl"))


@pytest.fixture
def note(options: BatchOptions) -> RunNote:
    return RunNote(options.output)


async def ids_of(options: BatchOptions, rows: list[Any] = ROWS, **changes: Any) -> dict[str, str]:
    """The request id under which a run submits each row; its custom_id is its prompt."""
    producer = FakeProducer()
    rows = [{**row, "body": {**row["body"], "model": row["custom_id"]}} for row in rows]
    write_rows(Path(options.input), rows)
    await run_batch(replace(options, **changes), producer)
    return {request.model or "": request.request_id for request in producer.seen}


async def killed(options: BatchOptions, note: RunNote, after: int = 0) -> dict[str, str]:
    """As `ids_of`, of a run that leaves what one leaves that is killed `after` so many rows."""
    taken = ""
    output = Path(options.output)
    output.unlink(missing_ok=True)

    def note_id(request: Request) -> Result:
        nonlocal taken
        taken = note.read() or ""
        return answer(request)

    producer = FakeProducer(answer=note_id)
    rows = [{**row, "body": {**row["body"], "model": row["custom_id"]}} for row in ROWS]
    write_rows(Path(options.input), rows)
    await run_batch(options, producer)
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:after]))
    note.write(taken)
    return {request.model or "": request.request_id for request in producer.seen}


@pytest.mark.parametrize("num_written", [0, 1])
async def test_a_killed_runs_rows_are_submitted_under_their_old_ids(
    options: BatchOptions, note: RunNote, num_written: int
) -> None:
    before = await killed(options, note, num_written)
    after = await ids_of(options)
    assert len(after) == 3 - num_written
    assert after.items() <= before.items()


async def test_an_edited_row_gets_a_new_id_and_so_never_an_old_answer(
    options: BatchOptions, note: RunNote
) -> None:
    before = await killed(options, note)
    after = await ids_of(options, [chat_row("a"), chat_row("b", seed=7), chat_row("new")])
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
    assert len({*before.values(), *after.values()}) == 5


async def test_a_row_keeps_its_id_wherever_it_stands_in_the_input(
    options: BatchOptions, note: RunNote
) -> None:
    before = await killed(options, note)
    assert await ids_of(options, ROWS[::-1]) == before


async def test_what_starts_anew_uses_new_ids(options: BatchOptions, note: RunNote) -> None:
    before = await killed(options, note, 1)
    after = await ids_of(options, restart=True)
    assert not before.items() & after.items()

    before = await killed(options, note, 1)
    Path(options.output).unlink()
    after = await ids_of(options)
    assert not before.items() & after.items()


async def test_retried_rows_get_new_ids_as_their_failures_may_still_be_known(
    options: BatchOptions, note: RunNote
) -> None:
    before = await killed(options, note)
    Path(options.output).write_bytes(
        b'{"id": "", "custom_id": "a", "response": null, "error": {"code": "c", "line": 1}}\n'
    )
    after = await ids_of(options, retry_failed=True)
    assert len(after) == 3
    assert not before.items() & after.items()


async def test_a_run_that_ends_leaves_no_note(options: BatchOptions, note: RunNote) -> None:
    await ids_of(options)
    assert not Path(note.path).exists()


async def test_an_interrupted_run_deletes_its_note_before_it_cancels_its_requests(
    options: BatchOptions, note: RunNote
) -> None:
    """Else the next run would take the cancellations for the results."""
    noted: list[str | None] = []

    class Stuck(FakeProducer):
        async def submit_many(self, requests: Any, **_: Any) -> AsyncIterator[Result]:
            try:
                async for request in requests:
                    yield answer(request)
                noted.append(note.read())
                await asyncio.Event().wait()
            finally:
                noted.append(note.read())

    task = asyncio.create_task(run_batch(options, Stuck()))
    while not noted:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    running, cancelling = noted
    assert running is not None
    assert cancelling is None


@pytest.mark.parametrize("content", [b"", b"01234567", b"\0" * 17])
async def test_a_note_that_a_crash_cut_short_counts_as_none(
    options: BatchOptions, note: RunNote, content: bytes
) -> None:
    Path(options.output).write_bytes(b"")
    Path(note.path).write_bytes(content)
    assert len(await ids_of(options)) == 3


async def test_somebody_elses_file_is_not_taken_for_a_note(
    options: BatchOptions, note: RunNote
) -> None:
    Path(note.path).write_bytes(b"my thoughts on running")
    with pytest.raises(FileError, match="move it away, or choose another path"):
        await run_batch(options, FakeProducer())
    assert Path(note.path).read_bytes() == b"my thoughts on running"


async def test_without_room_for_a_note_the_run_goes_on_and_says_so(
    options: BatchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RunNote, run_id: str) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(RunNote, "write", refuse)
    progress = FakeProgress()
    await run_batch(options, FakeProducer(), progress)
    assert sorted(custom_ids(Path(options.output))) == ["a", "b", "c"]
    [notice] = progress.notices
    assert "cannot write" in notice


async def test_a_result_that_comes_twice_or_for_nobody_is_ignored(options: BatchOptions) -> None:
    """A server that lost its last second may be told of a request again that it had ended."""

    class Repeating(FakeProducer):
        async def submit_many(self, requests: Any, **_: Any) -> AsyncIterator[Result]:
            async for request in requests:
                yield answer(request)
                yield replace(answer(request), text="once more")
                yield replace(answer(request), request_id=RequestId("unheard-of"))

    with capture_logs() as events:
        summary = await run_batch(options, Repeating())
    assert sorted(custom_ids(Path(options.output))) == ["a", "b", "c"]
    assert (summary.num_succeeded, summary.num_output_tokens) == (3, 9)
    assert str(events).count("it is not in flight") == 6
    assert "once more" not in str(events)
