"""A full disk makes a run wait, and loses nothing: with a disk that is told to be full, and with
one that is."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import FakeProducer, FakeProgress, chat_row, custom_ids, read_rows, write_rows

from producer.batch import BatchOptions, BatchSummary, run_batch
from wire.errors import FileError

ROWS = [chat_row(f"r{i}") for i in range(20)]


class Disk:
    """Takes `num_bytes_free` more bytes, then none until somebody makes room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOSPC) -> None:
        self.num_bytes_free = 2000
        self.num_refusals = 0
        self._error = error
        self._write = os.write
        monkeypatch.setattr("producer.batch.writer.os.write", self.write)
        monkeypatch.setattr("producer.batch.writer._FIRST_DELAY_S", 0.001)
        monkeypatch.setattr("producer.batch.writer._MAX_DELAY_S", 0.01)

    def write(self, fd: int, data: bytes) -> int:
        if not self.num_bytes_free:
            self.num_refusals += 1
            raise OSError(self._error, os.strerror(self._error))
        num_written = self._write(fd, data[: self.num_bytes_free])
        self.num_bytes_free -= num_written
        return num_written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


class Paused:
    """A run that has met the full disk."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.output = directory / "out.jsonl"
        self.source = write_rows(directory / "in.jsonl", ROWS)
        self.producer = FakeProducer()
        self.progress = FakeProgress()
        self._options = BatchOptions(self.source, str(self.output), max_in_flight=3, **options)

    async def start(self, disk: Disk, *, num_refusals: int = 3) -> asyncio.Task[BatchSummary]:
        """Start it, and wait until it has tried again and again."""
        run = asyncio.create_task(run_batch(self._options, self.producer, self.progress))
        async with asyncio.timeout(10):
            while disk.num_refusals < num_refusals:
                await asyncio.sleep(0.001)
        assert not run.done()
        return run

    async def later(self) -> BatchSummary:
        """The same command, given later."""
        return await run_batch(self._options, self.producer, self.progress)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_run_waits_for_space_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    disk = Disk(monkeypatch, error)
    paused = Paused(tmp_path)
    run = await paused.start(disk)
    num_whole = len(read_rows(paused.output))  # whole rows, while it waits
    assert 0 < num_whole < 20
    [told] = paused.progress.notices
    assert told.startswith(f"paused: cannot write to {paused.output}: {os.strerror(error)} (the ")
    assert "make space and the run goes on, or stop it and give the same command later" in told
    assert len(paused.producer.seen) <= num_whole + 3  # nothing more is submitted

    disk.num_bytes_free = 10**9
    summary = await run
    assert summary.num_succeeded == 20
    assert sorted(custom_ids(paused.output)) == sorted(f"r{i}" for i in range(20))
    assert paused.progress.notices[1:] == [
        f"there is space for {paused.output} again: the run goes on"
    ]


async def test_what_is_written_is_on_the_disk_before_the_wait(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(
        "producer.batch.writer.os.fsync", lambda fd: synced.append(os.fstat(fd).st_size)
    )
    paused = Paused(tmp_path)
    run = await paused.start(disk)
    assert synced == [paused.output.stat().st_size]
    disk.num_bytes_free = 10**9
    await run
    assert synced[1:] == [paused.output.stat().st_size]


async def test_a_run_that_is_stopped_while_it_waits_is_gone_on_with_later(
    tmp_path: Path, disk: Disk
) -> None:
    paused = Paused(tmp_path)
    run = await paused.start(disk)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    num_whole = len(read_rows(paused.output))

    disk.num_bytes_free = 10**9
    summary = await paused.later()
    assert (summary.num_resumed, summary.num_succeeded) == (num_whole, 20 - num_whole)
    assert sorted(custom_ids(paused.output)) == sorted(f"r{i}" for i in range(20))


async def test_failed_rows_wait_too(tmp_path: Path, disk: Disk) -> None:
    paused = Paused(tmp_path, errors=str(tmp_path / "errors.jsonl"))
    write_rows(tmp_path / "in.jsonl", [chat_row(f"r{i}", n=2) for i in range(20)])
    run = await paused.start(disk)
    disk.num_bytes_free = 10**9
    summary = await run
    assert summary.num_failed == 20
    assert sorted(custom_ids(tmp_path / "errors.jsonl")) == sorted(f"r{i}" for i in range(20))


async def test_a_rewrite_that_meets_a_full_disk_can_be_stopped(tmp_path: Path, disk: Disk) -> None:
    paused = Paused(tmp_path, retry_failed=True)
    disk.num_bytes_free = 10**9
    row = {"id": "", "custom_id": "r0", "response": None, "error": {"code": "c", "line": 1}}
    write_rows(
        paused.output,
        [row, *({"id": "", "custom_id": f"r{i}", "response": {}, "error": None} for i in (1, 2))],
    )
    before = paused.output.read_bytes()
    disk.num_bytes_free = 0
    run = await paused.start(disk)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert paused.output.read_bytes() == before
    assert not list(tmp_path.glob("*rewrite"))


async def test_a_disk_that_cannot_keep_what_it_took_ends_the_run(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("producer.batch.writer.os.fsync", fail)
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(FileError, match="Input/output error"):
        await run_batch(BatchOptions(source, str(tmp_path / "out.jsonl")), FakeProducer())


# A disk that is full. The file system is the child's own, and is gone when that ends.
PRIVATE_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
SCRIPT = """
import asyncio, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", sys.argv[2]], check=True)
print("mounted", flush=True)
from batch_fakes import FakeProducer, FakeProgress
from pathlib import Path
from producer.batch import BatchOptions, run_batch

disk = Path(sys.argv[2])
(disk / "ballast").write_bytes(bytes(48 * 1024))

class MakesRoom(FakeProgress):
    def on_notice(self, line):
        print(line, flush=True)
        if line.startswith("paused"):
            text = (disk / "out.jsonl").read_bytes()
            assert text.endswith(b"\\n")
            print(text.count(b"\\n"), flush=True)
            if sys.argv[3] == "wait":
                return
            (disk / "ballast").unlink()

run = run_batch(BatchOptions(sys.argv[1], str(disk / "out.jsonl")), FakeProducer(), MakesRoom())
print(asyncio.run(run).num_succeeded, (disk / "out.jsonl").read_bytes().count(b"\\n"), flush=True)
"""


@pytest.fixture
def full(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a run whose output lies on a tiny file system, with or without somebody to help."""
    source = write_rows(tmp_path / "in.jsonl", (chat_row(f"r{i}") for i in range(80)))
    (tmp_path / "disk").mkdir()
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    def start(how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*PRIVATE_MOUNTS, sys.executable, "-c", SCRIPT, source, str(tmp_path / "disk"), how],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        if process.stdout.readline() != "mounted\n":
            _, told = process.communicate()
            pytest.skip(f"no file system can be mounted here: {told.strip()}")
        return process

    return start


def test_a_file_system_that_is_full_is_waited_for(
    full: Callable[[str], subprocess.Popen[str]],
) -> None:
    with full("help") as process:
        told, complaints = process.communicate(timeout=30)
    pause, num_whole, again, end = told.splitlines()
    assert "No space left on device (the next row takes" in pause, complaints
    assert "bytes, 0 are free)" in pause
    assert 0 < int(num_whole) < 80
    assert again.endswith("again: the run goes on")
    assert end == "80 80"


def test_a_run_on_a_full_file_system_can_be_stopped(
    full: Callable[[str], subprocess.Popen[str]],
) -> None:
    with full("wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("paused: cannot write to ")
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in told.splitlines()[-1]
