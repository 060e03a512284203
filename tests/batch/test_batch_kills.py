"""`forebay run-batch` killed again and again, by SIGKILL: the output ends complete and exact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from batch_fakes import chat_row, custom_ids, read_rows, text_row, write_rows

from forebay.local import local_pipeline
from service.settings import LocalSettings
from support.waiting import wait_until

NUM_ROWS = 300


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return {**os.environ, "TMPDIR": str(temporary)}


class Batch:
    """One command, given again and again."""

    def __init__(self, directory: Path, environment: dict[str, str], *flags: str) -> None:
        self.output = directory / "out.jsonl"
        self.errors = directory / "errors.jsonl"
        self._environment = environment
        self._command = [sys.executable, "-m", "forebay", "run-batch", *flags]
        self._command += ["-i", str(directory / "in.jsonl"), "-o", str(self.output)]
        self._command += ["--errors", str(self.errors)]

    @contextmanager
    def started(self, *flags: str) -> Iterator[subprocess.Popen[str]]:
        """The command as a process."""
        with subprocess.Popen(
            [*self._command, *flags],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def killed_at(self, size_bytes: int) -> bool:
        """Kill it once the output has so many bytes; False if it ended before."""
        with self.started() as process:
            wait_until(lambda: process.poll() is not None or self.size_bytes >= size_bytes)
            process.kill()
            return process.wait(timeout=10) == -signal.SIGKILL

    def finish(self, *flags: str) -> str:
        """Let it come to its end; what it says."""
        with self.started(*flags) as process:
            _, told = process.communicate(timeout=60)
        assert process.returncode in (0, 1), told
        return told

    @property
    def size_bytes(self) -> int:
        """How long the output is."""
        return self.output.stat().st_size if self.output.exists() else -1


def check_complete(batch: Batch) -> None:
    """Every row once, over both files: 300 answers, a refused row, a duplicate."""
    assert sorted(custom_ids(batch.output)) == sorted(f"r{n}" for n in range(NUM_ROWS))
    assert all(row["response"]["status_code"] == 200 for row in read_rows(batch.output))
    refused = [(row["custom_id"], row["error"]["line"]) for row in read_rows(batch.errors)]
    assert sorted(refused) == [("bad", NUM_ROWS + 1), ("r7", NUM_ROWS + 2)]


def write_input(directory: Path, *, max_tokens: int) -> None:
    rows = [text_row(f"r{n}", max_tokens=max_tokens, ignore_eos=True) for n in range(NUM_ROWS)]
    write_rows(
        directory / "in.jsonl", [*rows, chat_row("bad", n=2), text_row("r7", prompt="again")]
    )


def test_a_run_with_its_own_pipeline_that_is_killed_ends_complete(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    write_input(tmp_path, max_tokens=80)
    batch = Batch(tmp_path, environment, "--model", "stub:")
    dice = random.Random(7)
    for _ in range(2):
        assert batch.killed_at(batch.size_bytes + dice.randrange(1, 40_000))
    assert "resumed: " in batch.finish()
    check_complete(batch)


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a server with a scheduler and a worker group that outlive every run."""
    directory = tmp_path / "pipeline"
    directory.mkdir(mode=0o700)
    async with local_pipeline(
        directory, settings=LocalSettings.load(), worker_flags={"model": "stub:"}
    ) as pipeline:
        yield pipeline.url


async def test_a_run_on_a_shared_server_that_is_killed_ends_complete(
    tmp_path: Path, environment: dict[str, str], shared: str
) -> None:
    write_input(tmp_path, max_tokens=40)
    batch = Batch(tmp_path, environment, "--redis", shared)
    dice = random.Random(11)
    num_kills = 0
    while num_kills < 6 and batch.killed_at(batch.size_bytes + dice.randrange(1, 30_000)):
        num_kills += 1
    assert num_kills > 2
    batch.finish("--retry-failed")
    check_complete(batch)


async def test_a_killed_runs_requests_are_taken_over_not_computed_again(
    tmp_path: Path, environment: dict[str, str], shared: str
) -> None:
    rows = [text_row(f"r{n}", prompt="Hello", max_tokens=500, ignore_eos=True) for n in range(100)]
    write_rows(tmp_path / "in.jsonl", rows)
    batch = Batch(tmp_path, environment, "--redis", shared)
    with redis.Redis.from_url(shared) as server:

        def states() -> dict[str, bytes | None]:
            keys = list(server.scan_iter("*:request:*"))
            return {key.decode().rpartition(":")[2]: server.hget(key, "state") for key in keys}

        with batch.started() as process:
            assert wait_until(lambda: len(states()) == 100)
            process.kill()
        num_written = len(batch.output.read_bytes().splitlines())
        assert wait_until(lambda: set(states().values()) == {b"done"}, timeout_s=30)
        known = states()

    told = batch.finish()
    assert f"{100 - num_written} answered, 0 failed" in told
    answers = read_rows(batch.output)
    assert sorted(row["custom_id"] for row in answers) == sorted(f"r{n}" for n in range(100))
    # Requests that had ended before the second run began.
    taken_over = answers[num_written:]
    assert len(taken_over) > 50
    assert {row["response"]["request_id"] for row in taken_over} <= known.keys()
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in answers} == {500}


def test_a_run_can_be_killed_at_every_step_that_it_takes_on_the_disk(tmp_path: Path) -> None:
    """Enumerated: before, half way through and after each system call that changes a file."""
    program = Path(__file__).parent / "batch_kill_points.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "files")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150
