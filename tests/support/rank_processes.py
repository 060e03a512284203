"""Starting tensor-parallel ranks as the processes that they are in production, and ending them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class RankProcesses:
    """Ranks that have loaded their part of the model and wait to be told to go."""

    processes: list[subprocess.Popen[str]]
    num_sharded_bytes: list[int]

    def go(self) -> list[list[int]]:
        """Let them decode; returns rank 0's answers once all have ended well."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers: list[list[int]] = _read_line(self.processes[0])
        assert [process.wait(timeout=60) for process in self.processes] == [0] * len(self.processes)
        return answers


@contextmanager
def loaded_ranks(
    size: int,
    model: Path,
    directory: Path,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
    num_blocks: int,
) -> Iterator[RankProcesses]:
    """`size` ranks of `model`, killed at the end if they are still there."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "tests"))),
    }
    options = {
        "size": size,
        "model": str(model),
        "rendezvous": str(directory / "rendezvous"),
        "prompts": [list(prompt) for prompt in prompts],
        "num_new_tokens": num_new_tokens,
        "num_blocks": num_blocks,
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(size):
            arguments = json.dumps({**options, "rank": rank})
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "support.greedy_rank", arguments],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        yield RankProcesses(processes, [_read_line(p)["num_sharded_bytes"] for p in processes])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _read_line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"rank process {process.pid} ended early with status {process.wait()}"
    return json.loads(line)
