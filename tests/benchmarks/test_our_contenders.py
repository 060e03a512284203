"""Forebay as a contender: the pipeline, the command and the bare engine do what they are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.command import run_workload
from benchmarks.contenders import BARE, PIPELINE, ours
from benchmarks.drivers import DriverError
from benchmarks.workloads import Row, Workload, write_workload
from support.model_files import gguf_path

STUB = "stub:"
WORKLOAD = Workload("mixed", (Row("a", (1, 2, 3), 4), Row("b", (4, 5), 2)))


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.ids.jsonl"
    write_workload(WORKLOAD, path)
    return path


def test_the_pipeline_answers_one_run_after_another(requests: Path) -> None:
    with ours(PIPELINE, ["--model", STUB]) as driver:
        first, second = driver.run(requests), driver.run(requests)
    for result in (first, second):
        assert {name: len(ids) for name, ids in result.outputs.items()} == {"a": 4, "b": 2}
        assert set(result.cpu_s) == {"command", "broker", "scheduler", "orchestrator", "rank"}
        assert 0 < result.wall_s < 10
    assert first.outputs == second.outputs


def test_the_command_is_timed_to_the_end_of_its_last_process() -> None:
    run = run_workload(STUB, [], WORKLOAD, watch=True)
    assert run.num_tokens == {"a": 4, "b": 2}
    assert 0 < run.first_answer_s <= run.wall_s
    assert run.peak_bytes is not None
    assert run.cpu_by_kind_s is not None
    assert {"command", "broker", "rank"} <= set(run.cpu_by_kind_s)
    with pytest.raises(DriverError, match="no-such-model"):
        run_workload("/no-such-model", [], WORKLOAD)


@pytest.mark.slow
def test_the_bare_engine_gives_the_tokens_of_the_pipeline(requests: Path) -> None:
    words = ["--model", str(gguf_path()), "--kv-cache-bytes", "64MiB", "--threads", "1"]
    with ours(BARE, words) as bare, ours(PIPELINE, words) as pipeline:
        assert bare.run(requests).outputs == pipeline.run(requests).outputs
        assert set(bare.run(requests).cpu_s) == {"engine"}
