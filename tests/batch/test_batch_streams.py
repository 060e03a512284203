"""Standard streams and pipes: real ones, in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch_fakes import chat_row, line, read_rows, write_rows

SCRIPT = """
import asyncio, sys
from batch_fakes import FakeProducer
from producer.batch import BatchOptions, run_batch

async def main():
    options = BatchOptions(sys.argv[1], sys.argv[2], max_in_flight=1)
    summary = await run_batch(options, FakeProducer())
    print(summary.num_succeeded, file=sys.stderr)

asyncio.run(main())
"""


@contextmanager
def batch_process(source: str, output: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", SCRIPT, source, output]
    env = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def test_rows_come_from_standard_input_and_go_to_standard_output() -> None:
    rows = b"".join(line(chat_row(f"r{i}")) + b"\n" for i in range(5000))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with batch_process("-", "-", **pipes) as process:
        written, told = process.communicate(rows, timeout=60)
    assert told.strip() == b"5000"
    ids = [json.loads(each)["custom_id"] for each in written.splitlines()]
    assert sorted(ids) == sorted(f"r{i}" for i in range(5000))


def test_a_shells_redirections_work(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [chat_row("a")])
    with (
        (tmp_path / "in.jsonl").open() as source,
        (tmp_path / "out.jsonl").open("wb") as output,
        batch_process("-", "-", stdin=source, stdout=output) as process,
    ):
        assert process.wait(timeout=60) == 0
    assert [row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")] == ["a"]


def test_a_pipe_is_answered_while_it_is_open_and_an_interrupt_ends_the_wait(
    tmp_path: Path,
) -> None:
    """The process sits in a read of a pipe that stays open, and must leave all the same."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with batch_process("-", "-", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line(chat_row("a")) + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == "a"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        assert process.stderr is not None
        told = process.stderr.read()
        assert b"KeyboardInterrupt" in told
        assert b"Fatal" not in told


def test_a_reader_that_leaves_ends_the_run_with_one_clear_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", (chat_row(f"r{i}") for i in range(5000)))
    with batch_process(source, "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()
        process.wait(timeout=60)
    assert b"cannot write to standard output: Broken pipe" in told


def test_a_named_pipe_is_an_input_like_any_other(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=pipe.write_bytes, args=(line(chat_row("a")),))
    feeder.start()
    with batch_process(str(pipe), str(tmp_path / "out.jsonl")) as process:
        assert process.wait(timeout=60) == 0
    feeder.join()
    assert [row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")] == ["a"]
