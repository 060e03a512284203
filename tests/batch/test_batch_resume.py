"""A run goes on from what the output holds: every row once, and none that has ended again."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import closing
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

from producer.batch import (
    BatchOptions,
    BatchSummary,
    IdleProducer,
    find_ended,
    open_files,
    run_batch,
)
from producer.batch.writer import LineWriter
from wire.errors import ConfigError, FileError, ForebayError
from wire.messages import ErrorInfo, Request, Result

ROWS = [chat_row(name) for name in "abcdef"]


def failing(*names: str) -> FakeProducer:
    """A producer whose requests fail if their model is one of `names`."""

    def outcome(request: Request) -> Result:
        if request.model in names:
            error = ErrorInfo("worker_lost", "its workers died")
            return replace(answer(request), state="failed", error=error)
        return answer(request)

    return FakeProducer(answer=outcome)


class Run:
    """Runs in one directory, one after another."""

    def __init__(self, directory: Path) -> None:
        self.source = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.errors = directory / "errors.jsonl"
        self.note = directory / "out.jsonl.forebay-run"
        self.producer = FakeProducer()
        self.progress = FakeProgress()

    async def __call__(
        self,
        rows: Sequence[object],
        producer: FakeProducer | None = None,
        *,
        errors: bool = False,
        **options: Any,
    ) -> BatchSummary:
        self.producer, self.progress = producer or FakeProducer(), FakeProgress()
        write_rows(self.source, rows)
        paths = (str(self.source), str(self.output), str(self.errors) if errors else None)
        return await run_batch(BatchOptions(*paths, **options), self.producer, self.progress)

    @property
    def submitted(self) -> int:
        """How many requests the last run submitted."""
        return len(self.producer.seen)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


async def test_rows_that_stand_in_the_output_are_not_run_again(run: Run) -> None:
    await run(ROWS[:4])
    first = run.output.read_bytes()

    summary = await run(ROWS)
    assert run.submitted == 2
    assert run.output.read_bytes().startswith(first)
    assert sorted(custom_ids(run.output)) == list("abcdef")
    assert (summary.num_rows, summary.num_resumed, summary.num_succeeded) == (6, 4, 2)
    assert run.progress.resumed == (4, 0)
    assert run.progress.notices == []


async def test_a_run_that_has_ended_needs_no_server_to_find_that_out(run: Run) -> None:
    await run(ROWS)
    before = run.output.read_bytes()
    options = BatchOptions(str(run.source), str(run.output))
    with open_files(options) as files, closing(await find_ended(options, files)) as found:
        assert found.num_left == 0
        summary = await run_batch(options, IdleProducer(), files=files, resumption=found)
    assert (summary.num_rows, summary.num_resumed, summary.num_succeeded) == (6, 6, 0)
    assert run.output.read_bytes() == before


async def test_a_row_that_came_after_the_look_is_not_lost_without_a_word(run: Run) -> None:
    await run(ROWS[:1])
    options = BatchOptions(str(run.source), str(run.output))
    with open_files(options) as files, closing(await find_ended(options, files)) as found:
        with run.source.open("ab") as source:
            source.write(line(ROWS[1]) + b"\n")
        with pytest.raises(ForebayError, match="has grown"):
            await run_batch(options, IdleProducer(), files=files, resumption=found)


# Cut short


async def test_a_last_row_torn_at_any_byte_is_run_again(run: Run) -> None:
    """What a kill in the middle of a write leaves, or a crash of the machine."""
    await run(ROWS[:2])
    whole = run.output.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) - 1):
        run.output.write_bytes(whole[:end])
        summary = await run(ROWS[:2])
        assert (summary.num_resumed, run.submitted) == (1, 1)
        assert sorted(custom_ids(run.output)) == ["a", "b"]
        assert [f"its {end - start} bytes" in told for told in run.progress.notices] == (
            [True] if end > start else []
        )


async def test_a_row_that_lacks_its_line_break_alone_is_kept(run: Run) -> None:
    await run(ROWS[:2])
    whole = run.output.read_bytes()
    run.output.write_bytes(whole[:-1])
    await run(ROWS[:2])
    assert run.submitted == 0
    assert run.output.read_bytes() == whole


async def test_zeros_that_a_crash_left_behind_are_a_torn_row(run: Run) -> None:
    await run(ROWS[:2])
    whole = run.output.read_bytes()
    for zeros in (b"\0" * 100, b'{"id":"batch_req_0f' + b"\0" * 50):
        run.output.write_bytes(whole + zeros)
        await run(ROWS[:2])
        assert run.output.read_bytes() == whole


async def test_both_files_are_mended(run: Run) -> None:
    await run([*ROWS[:2], b"bad"], failing(), errors=True)
    for path in (run.output, run.errors):
        path.write_bytes(path.read_bytes()[:-9])
    await run([*ROWS[:2], b"bad"], errors=True)
    assert sorted(custom_ids(run.output)) == ["a", "b"]
    assert [row["error"]["line"] for row in read_rows(run.errors)] == [3]
    assert len(run.progress.notices) == 2


# Failed rows


async def test_failed_rows_have_ended_too(run: Run) -> None:
    rows = [*ROWS[:2], chat_row("bad", model="bad"), b"no json", chat_row("a", seed=1)]
    for errors in (True, False):
        run.output.unlink(missing_ok=True)
        await run(rows, failing("bad"), errors=errors)
        before = run.output.read_bytes()
        summary = await run(rows, errors=errors)
        assert run.submitted == 0
        assert run.output.read_bytes() == before
        assert (summary.num_resumed, summary.num_resumed_failed) == (5, 3)
        assert run.progress.resumed == (2, 3)


@pytest.mark.parametrize("errors", [True, False], ids=["errors apart", "one file"])
async def test_failed_rows_are_run_again_if_asked_to(run: Run, errors: bool) -> None:
    rows = [*ROWS[:2], chat_row("bad", model="bad"), chat_row("c", n=2), b"no json", ROWS[0]]
    await run(rows, failing("bad"), errors=errors)
    rows[3] = ROWS[2]  # mended

    summary = await run(rows, errors=errors, retry_failed=True)
    assert {request.model for request in run.producer.seen} == {"bad", None}
    assert run.submitted == 2
    assert (summary.num_rows, summary.num_resumed, summary.num_succeeded) == (6, 2, 2)
    assert run.progress.notices == ["failed rows that are run again: 4"]
    assert summary.failed_by_code == {"invalid_request": 1, "duplicate_custom_id": 1}
    written = read_rows(run.output) + (read_rows(run.errors) if errors else [])
    assert sorted(row["custom_id"] or "" for row in written) == ["", "a", "a", "b", "bad", "c"]
    assert [path.name for path in sorted(run.output.parent.iterdir())] == (
        ["errors.jsonl", "in.jsonl", "out.jsonl"] if errors else ["in.jsonl", "out.jsonl"]
    )


async def test_a_rewritten_file_keeps_its_mode_and_its_name(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run.output.symlink_to(elsewhere / "real.jsonl")
    await run([chat_row("a", model="bad"), ROWS[1]], failing("bad"))
    run.output.chmod(0o640)
    await run([chat_row("a", model="bad"), ROWS[1]], retry_failed=True)
    assert run.output.is_symlink()
    assert run.output.stat().st_mode & 0o777 == 0o640
    assert sorted(custom_ids(elsewhere / "real.jsonl")) == ["a", "b"]


async def test_a_failed_rewrite_leaves_the_file_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat_row("a", model="bad"), ROWS[1]]
    await run(rows, failing("bad"))
    before = run.output.read_bytes()

    def refuse(source: str, target: str) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("producer.batch.writer.os.replace", refuse)
        with pytest.raises(FileError, match="Read-only file system"):
            await run(rows, retry_failed=True)
    assert run.output.read_bytes() == before
    await run(rows, retry_failed=True)
    assert sorted(custom_ids(run.output)) == ["a", "b"]
    assert not list(run.output.parent.glob("*rewrite"))


# Which row is which


async def test_what_failed_as_a_duplicate_is_the_same_in_each_run(run: Run) -> None:
    rows = [chat_row("a"), chat_row("a", seed=1), chat_row("b", n=2), chat_row("b")]
    await run(rows)
    whole = run.output.read_bytes().splitlines(keepends=True)
    expected = sorted((row["custom_id"], bool(row["error"])) for row in read_rows(run.output))
    for number in range(len(whole)):
        run.output.write_bytes(b"".join(whole[:number]))
        await run(rows)
        written = read_rows(run.output)
        assert sorted((row["custom_id"], bool(row["error"])) for row in written) == expected
        assert [row["error"]["line"] for row in written if row["error"]] in ([2, 3, 4], [3, 2, 4])


async def test_an_edited_row_keeps_its_answer_and_that_is_told(run: Run) -> None:
    await run(ROWS[:3])
    edited = chat_row("b", seed=1)
    await run([ROWS[0], edited, ROWS[2], ROWS[3]])
    assert run.submitted == 1
    [notice] = run.progress.notices
    assert notice.startswith("rows edited since they were run: 1; ")

    await run([ROWS[0], edited, ROWS[2], ROWS[3]], restart=True)
    assert run.submitted == 4
    assert run.progress.notices == []


async def test_rows_may_be_added_and_moved_about(run: Run) -> None:
    await run(ROWS[:4])
    await run([text_row("new"), *reversed(ROWS[:4])])
    assert run.submitted == 1
    assert sorted(custom_ids(run.output)) == ["a", "b", "c", "d", "new"]


async def test_an_input_from_a_pipe_is_gone_on_with(run: Run, tmp_path: Path) -> None:
    await run(ROWS[:3])

    async def piped(rows: Sequence[object]) -> BatchSummary:
        receiver, sender = os.pipe()
        os.write(sender, b"".join(line(row) + b"\n" for row in rows))
        os.close(sender)
        try:
            options = BatchOptions(f"/dev/fd/{receiver}", str(run.output))
            return await run_batch(options, FakeProducer())
        finally:
            os.close(receiver)

    summary = await piped(ROWS)
    assert (summary.num_resumed, summary.num_succeeded) == (3, 3)
    with pytest.raises(FileError, match=r"line \d of .*out.jsonl has a custom_id that no row"):
        await piped(ROWS[1:])


# Files that cannot be gone on with

ANSWER = b'{"id": "x", "custom_id": "a", "response": {}, "error": null}'
FAILURE = b'{"id": "x", "custom_id": "a", "response": null, "error": {"code": "c", "line": 1}}'
NAMELESS = b'{"id": "x", "custom_id": null, "response": null, "error": {"code": "c", "line": 1}}'
TORN = b'{"id":"batch_req_01'


DAMAGED = [
    (b"precious", "line 1 of .*out.jsonl is no row of a batch output.* --restart"),
    (b"precious\n", "line 1 of .*out.jsonl is no row"),
    (TORN + b"\n" + ANSWER + b"\n", "line 1 of .*out.jsonl is no row"),
    (ANSWER + b"\n" + b"\0" * 99 + b"\n", "line 2 of .*out.jsonl is no row"),
    (ANSWER + b"\n[1]\n", "line 2 of .*out.jsonl is no row"),
    (ANSWER + b"\n" + b"[" * 100_000 + b"\n", "line 2 of .*out.jsonl is no row"),
    (b'{"a": 1}', "line 1 of .*out.jsonl is no row"),
    (ANSWER.replace(b'"a"', b"7"), "line 1 of .*out.jsonl is no row"),
    (ANSWER.replace(b'"custom_id"', b'"id2"') + b"\n", "line 1 of .*out.jsonl is no row"),
    (ANSWER.replace(b"{}", b"null") + b"\n", "line 1 of .*out.jsonl is no row"),
    (NAMELESS.replace(b"1}", b"-1}") + b"\n", "line 1 of .*out.jsonl is no row"),
    (ANSWER.replace(b'"a"', b'"zz"') + b"\n", "line 1 of .*out.jsonl has a custom_id that no"),
    (FAILURE.replace(b'"a"', b'"zz"') + b"\n", "line 1 of .*out.jsonl has a custom_id that"),
    (ANSWER + b"\n" + ANSWER + b"\n", "line 2 of .* stands for the same row as line 1 of"),
    (ANSWER + b"\n" + FAILURE + b"\n", "line 2 of .* stands for the same row as line 1 of"),
    (NAMELESS + b"\n", r"line 1 of .* that is another one in .*in.jsonl now.* --retry-failed"),
]


@pytest.mark.parametrize(("content", "said"), DAMAGED)
async def test_what_no_run_of_this_input_wrote_is_left_alone(
    run: Run, content: bytes, said: str
) -> None:
    run.output.write_bytes(content)
    with pytest.raises(FileError, match=said):
        await run(ROWS)
    assert run.submitted == 0
    assert run.output.read_bytes() == content
    assert not run.note.exists()

    await run(ROWS, restart=True)
    assert sorted(custom_ids(run.output)) == list("abcdef")


@pytest.mark.parametrize(
    "content", [NAMELESS + b"\n", ANSWER + b"\n" + FAILURE + b"\n", FAILURE + b"\n" + FAILURE]
)
async def test_failed_rows_that_fit_no_more_can_be_run_again(run: Run, content: bytes) -> None:
    run.output.write_bytes(content)
    await run(ROWS, retry_failed=True)
    assert sorted(custom_ids(run.output)) == list("abcdef")


async def test_exchanged_paths_are_noticed(run: Run) -> None:
    run.errors.write_bytes(ANSWER + b"\n")
    with pytest.raises(FileError, match=r"line 1 of .*errors.jsonl is an answer"):
        await run(ROWS, errors=True)
    assert run.errors.read_bytes() == ANSWER + b"\n"


async def test_an_errors_file_alone_is_nothing_to_go_on_from(run: Run) -> None:
    write_rows(run.source, ROWS)
    run.errors.write_bytes(FAILURE + b"\n")
    options = BatchOptions(str(run.source), "/dev/null", errors=str(run.errors))
    with pytest.raises(ConfigError, match=r"holds \d+ bytes of another run"):
        await run_batch(options, FakeProducer())
    await run_batch(replace(options, restart=True), FakeProducer())
    assert run.errors.read_bytes() == b""
    with pytest.raises(ConfigError, match="--retry-failed needs an output to go on with"):
        await run_batch(replace(options, retry_failed=True), FakeProducer())


async def test_a_restart_loses_what_was_there_but_only_when_it_begins(run: Run) -> None:
    run.output.write_bytes(b"precious\n")
    write_rows(run.source, ROWS)
    options = BatchOptions(str(run.source), str(run.output), restart=True)
    with open_files(options) as files, closing(await find_ended(options, files)):
        assert run.output.read_bytes() == b"precious\n"
    await run(ROWS, restart=True)
    assert sorted(custom_ids(run.output)) == list("abcdef")


async def test_another_run_on_the_same_files_is_refused_by_name(run: Run) -> None:
    write_rows(run.source, ROWS)
    options = BatchOptions(str(run.source), str(run.output), errors=str(run.errors))
    with open_files(options):
        for other in (options, replace(options, output=str(run.output) + ".2")):
            with pytest.raises(FileError, match=rf"another run \(process {os.getpid()}\)"):
                await run_batch(other, FakeProducer())
    await run_batch(options, FakeProducer())
    assert sorted(custom_ids(run.output)) == list("abcdef")


async def test_whoever_waited_for_a_file_that_was_rewritten_gets_the_new_one(run: Run) -> None:
    """Else two runs could each hold the lock of their own file, under one name."""
    rows = [chat_row("a", model="bad"), ROWS[1]]
    await run(rows, failing("bad"))
    with closing(LineWriter(str(run.output), purpose="results")) as late:
        await run(rows, retry_failed=True)
        assert not os.path.samestat(late.status, run.output.stat())
        late.claim()
        assert os.path.samestat(late.status, run.output.stat())
        with pytest.raises(FileError, match="being written by another run"):
            await run(rows)


async def test_where_files_cannot_be_locked_the_run_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("producer.batch.file_lock.fcntl.flock", refuse)
    await run(ROWS[:1])
    [notice] = run.progress.notices
    assert "cannot be locked (Operation not supported)" in notice
    assert custom_ids(run.output) == ["a"]
