"""Contenders, taking turns, and what is printed of them: with a peer that only counts."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import compare, contenders, throughput
from benchmarks.agreement import agreement
from benchmarks.drivers import Driver, DriverError, Round
from benchmarks.flags import engine_flags
from benchmarks.peer_environments import PEERS, Peer
from benchmarks.processes import kind_of, peak_bytes
from benchmarks.turns import Score, take_turns
from benchmarks.workloads import TIMED, WARM_UP, Row, Workload, write_workload

FAKE = Path(__file__).parent / "fake_driver.py"
WORKLOADS = {
    name: Workload(name, (Row(f"{name}-0", (1, 2, 3), 4), Row(f"{name}-1", (4, 5), 2)))
    for name in (WARM_UP, *TIMED)
}


def fake(name: str, *flags: str) -> Driver:
    return Driver(name, [sys.executable, str(FAKE), *flags])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name, workload in WORKLOADS.items():
        write_workload(workload, tmp_path / f"{name}.ids.jsonl")
    return tmp_path


@pytest.fixture
def counting_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Peer):
        @property
        def driver(self) -> Path:
            return FAKE

    monkeypatch.setitem(PEERS, "vllm", Fake("vllm", ("float16", "bfloat16"), "steps"))
    monkeypatch.setattr(compare, "ours", lambda kind, words: fake(kind, "--first-token", "5"))


def test_contenders_run_in_turns_on_the_same_requests(tmp_path: Path) -> None:
    with ExitStack() as stack:
        drivers = [stack.enter_context(fake(name)) for name in ("one", "other")]
        scores = take_turns(drivers, WORKLOADS, ["mixed"], num_rounds=3, directory=tmp_path)
    assert list(scores["mixed"]) == ["one", "other"]
    for score in scores["mixed"].values():
        assert len(score.rounds) == 3
        assert score.rounds[0].outputs == {"mixed-0": [5, 6, 7, 8], "mixed-1": [5, 6]}
        assert score.peak_bytes > 1024 * 1024


def test_another_number_of_tokens_is_no_result(tmp_path: Path) -> None:
    with fake("long", "--surplus", "1") as driver, pytest.raises(ValueError, match="gave 5 tokens"):
        take_turns([driver], WORKLOADS, ["mixed"], num_rounds=1, directory=tmp_path)


def test_a_contender_that_fails_says_why(work: Path) -> None:
    with fake("poor", "--fail") as driver, pytest.raises(DriverError, match="out of luck"):
        driver.run(work / "mixed.ids.jsonl")
    with pytest.raises(DriverError, match="unrecognized arguments: --unknown"):
        fake("poor", "--unknown").__enter__()


def test_the_comparison_prints_ratios_and_one_line_of_json(
    work: Path,
    counting_peer: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = {"mixed-0": [5, 6, 1, 1], "mixed-1": [5, 6]}
    (work / "mixed.json").write_text(json.dumps(reference))
    words = ["--model", str(work), "--work", str(work), "--reference", str(work)]
    words += ["--peer", "vllm", "--peer-python", sys.executable, "--peer-model", str(work)]
    words += ["--workload", "mixed", "--rounds", "1", "--no-command", "--dtype", "float16"]
    words += ["--peer-flags=--first-token 6 --run-s 0.01"]
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    compare.main()
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["engine_flags"] == ["--dtype", "float16"]
    mixed = report["workloads"]["mixed"]
    names = [f"vllm {work.name} {dtype}" for dtype in ("float16", "bfloat16")]
    assert set(mixed["ratio"]) == set(names)
    assert mixed["fastest_peer"] in names
    assert mixed["ratio"][names[0]] < 1
    assert mixed["pipeline"]["agreement"] == {
        "first_token": 1.0,
        "leading_tokens": 0.6667,
        "identical": 0.5,
    }
    assert mixed[names[0]]["agreement"]["first_token"] == 0.0
    assert mixed["first_token_as_fastest_peer"] == 0.0
    assert any("first 100.0%, leading 66.7%" in row for row in table)


def test_a_peer_without_its_environment_is_told_about(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["compare", "--model", str(work), "--work", str(work), "--peer", "openvino"]
    monkeypatch.setattr(sys, "argv", base)
    with pytest.raises(SystemExit, match="--peer-python and --peer-model"):
        compare.main()
    monkeypatch.setattr(sys, "argv", ["compare", "--peer", "openvino", "--describe"])
    compare.main()
    assert "optimum-cli export openvino" in capsys.readouterr().out


def test_every_peer_has_a_driver() -> None:
    for peer in PEERS.values():
        assert peer.driver.is_file()
        assert peer.steps


def test_libraries_to_preload_are_found_beside_the_interpreter(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    peer = Peer("vllm", ("float16",), "", preloads=("lib/libiomp5.so", "lib/libmissing.so"))
    assert peer.preloaded(tmp_path / "bin" / "python") == [str(library)]


def test_agreement_counts_the_tokens_before_the_first_that_differs() -> None:
    reference = {"a": [1, 2, 3, 4], "b": [9], "c": [7, 7]}
    found = agreement(reference, {"a": [1, 2, 9, 4], "b": [8, 1], "unknown": [1]})
    assert found is not None
    assert found.first_token == 0.5
    assert found.leading_tokens == 2 / 5
    assert found.identical == 0
    assert agreement(reference, {"unknown": [1]}) is None


def test_overhead_compares_each_round_with_its_neighbour() -> None:
    def score(*walls_and_cpus: tuple[float, float]) -> Score:
        return Score(tuple(Round(wall, {"rank": cpu}, 0, {}) for wall, cpu in walls_and_cpus))

    scores = {
        "mixed": {
            contenders.PIPELINE: score((10.1, 22.0), (20.4, 44.0), (10.3, 33.0)),
            contenders.BARE: score((10.0, 20.0), (20.0, 40.0), (10.0, 30.0)),
        }
    }
    assert throughput.overhead(scores, "mixed") == {"wall": 0.02, "cpu": 0.1}


def test_flags_of_the_engine_are_passed_through() -> None:
    words = ["--max-num-seqs", "64", "--dtype=float16"]
    assert engine_flags(words) == {"max_num_seqs": "64", "dtype": "float16"}
    with pytest.raises(ValueError, match="--dtype is not a flag with a value"):
        engine_flags(["--dtype"])


def test_processes_are_told_apart_by_what_they_run() -> None:
    python = ["/usr/bin/python", "-P", "-m"]
    assert kind_of([*python, "gpu_worker.rank", "--rank", "0"]) == "rank"
    assert kind_of([*python, "gpu_worker", "--model", "x"]) == "orchestrator"
    assert kind_of([*python, "scheduler"]) == "scheduler"
    assert kind_of([*python, "forebay", "run-batch"]) == "command"
    assert kind_of(["/opt/valkey-server unixsocket:/tmp/broker.sock"]) == "broker"
    assert kind_of(["VLLM::Worker"]) == "VLLM::Worker"


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    assert peak_bytes(2**22 + 1) == 0
