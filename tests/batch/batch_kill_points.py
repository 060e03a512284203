"""A program that kills a batch run at every step it takes on the disk, and lets it be gone on with.

    python batch_kill_points.py DIRECTORY

Each system call by which a run changes a file is a step; the run's process ends before it, after
it, or half way through it, as by SIGKILL. Then the same command is given again. Prints how many
points there were, or fails with what was wrong after which.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from batch_fakes import FakeProducer, answer, chat_row, read_rows, write_rows

from producer.batch import BatchOptions, run_batch
from wire.messages import ErrorInfo, Request, Result

STEPS = ("open", "write", "ftruncate", "replace", "unlink", "fsync", "fchmod", "close")
KILLED = 77

ROWS: list[object] = [
    chat_row("a"),
    chat_row("b", model="fails"),
    b"no json",
    chat_row("a", seed=1),
    chat_row("c", n=2),
    chat_row("d"),
]


def outcome(request: Request) -> Result:
    if request.model == "fails":
        return replace(answer(request), state="failed", error=ErrorInfo("x", "failed"))
    return answer(request)


class Killer:
    """Ends this process at the step with the given number, `when`: before, half way or after."""

    def __init__(self, number: int, when: str) -> None:
        self._left = number
        self._when = when
        for name in ("write",) if when == "half way" else STEPS:
            setattr(os, name, self._wrapped(getattr(os, name)))
        if when != "half way":
            builtins.open = self._wrapped(builtins.open)

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left:
                return call(*arguments, **options)
            if self._when == "half way":
                descriptor, data = arguments
                call(descriptor, data[: len(data) // 2])
            elif self._when == "after":
                call(*arguments, **options)
            os._exit(KILLED)

        return step


class Scene:
    """The files of a run, as they are before it, and its options."""

    def __init__(self, directory: Path, *, errors: bool = True) -> None:
        self.directory = directory
        source = write_rows(directory / "in.jsonl", ROWS)
        self.output, self.errors = directory / "out.jsonl", directory / "errors.jsonl"
        self.options = BatchOptions(
            source, str(self.output), str(self.errors) if errors else None, max_in_flight=2
        )

    def run(self, options: BatchOptions | None = None) -> FakeProducer:
        """Let it come to its end."""
        producer = FakeProducer(answer=outcome)
        asyncio.run(run_batch(options or self.options, producer))
        return producer

    def run_killed(self, options: BatchOptions, number: int, when: str) -> bool:
        """Run it in a child; whether that was killed, before it came to its end."""
        child = os.fork()
        if child == 0:
            try:
                Killer(number, when)
                self.run(options)
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED), status
        return status == KILLED

    def standing(self) -> list[dict[str, Any]]:
        """All whole rows in both files."""
        lines = [
            line
            for path in (self.output, self.errors)
            if path.exists()
            for line in path.read_bytes().splitlines(keepends=True)
        ]
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def check(self, before: list[dict[str, Any]], again: FakeProducer) -> None:
        """Every row once, and none run again that stood."""
        written = read_rows(self.output)
        written += read_rows(self.errors) if self.errors.exists() else []
        found = sorted((row["error"] or {}).get("line", 0) for row in written)
        assert found == [0, 0, 2, 3, 4, 5], found
        assert sorted(row["custom_id"] or "" for row in written) == ["", "a", "a", "b", "c", "d"]
        stood = {
            row["custom_id"] for row in before if not row["error"] or row["error"]["line"] == 2
        }
        assert len(again.seen) == 3 - len(stood), stood
        left = {path.name for path in self.directory.iterdir()}
        assert left <= {"in.jsonl", "out.jsonl", "errors.jsonl"}, left


def fresh(scene: Scene) -> BatchOptions:
    return scene.options


def torn(scene: Scene) -> BatchOptions:
    scene.run()
    for path in (scene.output, scene.errors):
        if path.exists():
            path.write_bytes(path.read_bytes()[:-20])
    return scene.options


def retried(scene: Scene) -> BatchOptions:
    scene.run()
    return replace(scene.options, retry_failed=True)


def restarted(scene: Scene) -> BatchOptions:
    scene.run()
    return replace(scene.options, restart=True)


def main(directory: Path) -> None:
    os.fsync = lambda fd: None  # what a process hands to the kernel survives its end
    num_points = 0
    for prepare in (fresh, torn, retried, restarted):
        for errors in (True, False):
            for when in ("before", "half way", "after"):
                number = 0
                killed = True
                while killed:
                    number += 1
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir()
                    scene = Scene(directory, errors=errors)
                    killed = scene.run_killed(prepare(scene), number, when)
                    before = scene.standing()
                    try:
                        scene.check(before, scene.run())
                    except BaseException:
                        print(f"{prepare.__name__}, {when} step {number}", file=sys.stderr)
                        raise
                num_points += number - 1
    print(num_points)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
