"""The whole pipeline on one machine, with the stub engine: it comes up, works, and goes away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forebay.broker_binary import BrokerBinary
from forebay.local import local_pipeline
from service.settings import LocalSettings
from support.waiting import wait_until

FOREBAY = [sys.executable, "-m", "forebay"]


def rows(number: int, *, max_tokens: int = 4) -> str:
    body = {"prompt": "Hello", "max_tokens": max_tokens}
    row = {"method": "POST", "url": "/v1/completions", "body": body}
    return "".join(json.dumps({"custom_id": f"row-{n}", **row}) + "\n" for n in range(number))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Everything that a command writes stays in the test's own directories."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return {**os.environ, "TMPDIR": str(temporary), "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def batch(tmp_path: Path) -> list[str]:
    """A batch run of twenty rows from in.jsonl to out.jsonl."""
    (tmp_path / "in.jsonl").write_text(rows(20))
    return [*FOREBAY, "run-batch", "-i", f"{tmp_path}/in.jsonl", "-o", f"{tmp_path}/out.jsonl"]


def answers(path: Path) -> set[str]:
    return {json.loads(line)["custom_id"] for line in path.read_text().splitlines()}


def test_a_batch_run_brings_its_pipeline_and_takes_it_down(
    tmp_path: Path, batch: list[str], environment: dict[str, str], broker_binary: BrokerBinary
) -> None:
    done = subprocess.run(
        [*batch, "--model", "stub:", "--groups", "2", "--broker", str(broker_binary.path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "20: 20 answered, 0 failed" in done.stderr
    assert answers(tmp_path / "out.jsonl") == {f"row-{n}" for n in range(20)}
    assert not list(Path(environment["TMPDIR"]).iterdir())


def test_files_of_the_user_that_are_called_as_ours_do_no_harm(
    tmp_path: Path, batch: list[str], environment: dict[str, str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("cache", "gpu_worker", "producer", "scheduler", "service", "types", "wire"):
        (here / f"{name}.py").write_text("raise SystemExit('taken for ours')")
    done = subprocess.run(
        [sys.executable, "-P", *batch[1:], "--model", "stub:"],
        env=environment,
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_answers_can_go_to_standard_output(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*FOREBAY, "run-batch", "-i", "-", "-o", "-", "--model", "stub:"],
        input=rows(3),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()]


def test_a_row_that_fails_is_told_by_the_exit_code(
    tmp_path: Path, batch: list[str], environment: dict[str, str]
) -> None:
    (tmp_path / "in.jsonl").write_text(rows(2) + "not JSON\n")
    done = subprocess.run(
        [*batch, "--model", "stub:"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "failed: row 3" in done.stderr
    assert "3: 2 answered, 1 failed" in done.stderr


def test_a_damaged_model_is_one_line_in_the_workers_words(
    tmp_path: Path, batch: list[str], environment: dict[str, str]
) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF\x03\x00\x00\x00 and then nothing that makes sense")
    done = subprocess.run(
        [*batch, "--model", str(model)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(model) in line
    assert not list(Path(environment["TMPDIR"]).iterdir())


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_answers_and_leaves_nothing_else(
    tmp_path: Path, batch: list[str], environment: dict[str, str], signal_number: int
) -> None:
    output = tmp_path / "out.jsonl"
    # The input stays open after two rows, so the run cannot come to its end.
    reading, writing = os.pipe()
    os.write(writing, rows(2).encode())
    with subprocess.Popen(
        [*FOREBAY, "run-batch", "-i", "-", "-o", str(output), "--model", "stub:"],
        stdin=reading,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        os.close(reading)
        assert wait_until(lambda: output.exists() and output.read_text().count("\n") == 2)
        process.send_signal(signal_number)
        os.close(writing)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in err
    assert answers(output) == {"row-0", "row-1"}
    assert not list(Path(environment["TMPDIR"]).iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_killed_run_takes_all_its_processes_along(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*FOREBAY, "run-batch", "-i", "-", "-o", "-", "--model", "stub:"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(rows(1).encode())
        process.stdin.flush()
        assert process.stdout.readline()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4, "broker, scheduler, worker and its rank"
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", ["scheduler", "gpu_worker", "broker"])
def test_a_process_that_is_killed_is_replaced_and_the_run_goes_on(
    environment: dict[str, str], name: str
) -> None:
    with open_run(environment) as process:
        ask(process, 1)
        victim = child_of(process, name)
        victim.kill()
        assert wait_until(lambda: not victim.is_running())
        ask(process, 2, first=1)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err.decode()
    assert b"3: 3 answered, 0 failed" in err


def test_a_process_that_dies_again_and_again_ends_the_run(environment: dict[str, str]) -> None:
    with open_run(environment) as process:
        ask(process, 1)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                child_of(process, "scheduler").kill()
            time.sleep(0.05)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 4
    last_line = err.decode().splitlines()[-1]
    assert last_line.startswith("error: the scheduler process was killed by signal 9")


def open_run(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A batch run that reads from us and writes to us."""
    return subprocess.Popen(
        [*FOREBAY, "run-batch", "-i", "-", "-o", "-", "--model", "stub:"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def ask(process: subprocess.Popen[bytes], number: int, *, first: int = 0) -> None:
    """Give the run some rows and wait for their answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("".join(rows(first + number).splitlines(True)[first:]).encode())
    process.stdin.flush()
    for _ in range(number):
        assert process.stdout.readline()


def child_of(process: subprocess.Popen[bytes], name: str) -> psutil.Process:
    """One of the run's own children."""
    wanted = {"broker": "-server"}.get(name, name)
    [child] = [
        child
        for child in psutil.Process(process.pid).children()
        if any(wanted in part for part in child.cmdline())
    ]
    return child


@pytest.fixture
def up(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A running `forebay up`."""
    with subprocess.Popen(
        [*FOREBAY, "up", "--model", "stub:", "--served-model-name", "echo"],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Forebay is up and serves echo" in line:
                break
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=20)


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FOREBAY, *arguments], env=environment, capture_output=True, text=True, timeout=30
    )


def test_what_is_up_is_found_by_the_other_commands(
    up: subprocess.Popen[str], environment: dict[str, str], tmp_path: Path, batch: list[str]
) -> None:
    asked = command(environment, "submit", "Hello there", "--max-tokens", "5")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.strip()

    streamed = command(environment, "submit", "Hello there", "--max-tokens", "5", "--stream")
    assert (streamed.returncode, streamed.stdout) == (0, asked.stdout)

    needs = ("--json", "--need-scheduler")
    status = command(environment, "status", *needs)
    assert status.returncode == 0
    [group] = json.loads(status.stdout)["groups"]
    assert group["model"] == "echo"
    assert command(environment, "status", "--need-group", group["group_id"]).returncode == 0
    assert command(environment, "status", "--need-group", "nobody").returncode == 4

    url = f"unix://{environment['XDG_STATE_HOME']}/forebay/broker.sock"
    ran = command(environment, *batch[3:], "--redis", url)
    assert ran.returncode == 0, ran.stderr
    assert len(answers(tmp_path / "out.jsonl")) == 20

    again = command(environment, "up", "--model", "stub:")
    assert again.returncode == 2
    assert f"in use by process {up.pid}" in again.stderr


def test_it_goes_down_in_an_orderly_way(
    up: subprocess.Popen[str], environment: dict[str, str]
) -> None:
    family = psutil.Process(up.pid).children(recursive=True)
    up.terminate()
    assert up.wait(timeout=20) == 0
    assert not [child for child in family if child.is_running()]
    assert command(environment, "submit", "Hello").returncode == 4


async def test_what_a_killed_pipeline_left_is_cleared_away(tmp_path: Path) -> None:
    litter = tmp_path / "tmp" / "forebay-ranks-x"
    litter.mkdir(parents=True)
    settings, flags = LocalSettings.load(), {"model": "stub:"}
    async with local_pipeline(tmp_path, settings=settings, worker_flags=flags):
        assert not litter.exists()
