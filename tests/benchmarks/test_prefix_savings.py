"""The replay of workloads through the cache's policies, and the oracle beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.prefix_replay import Limits
from benchmarks.prefix_savings import Replays
from benchmarks.prefix_workloads import conversation_trace, shared_prefixes

LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=512, max_num_owned=16)
WORKLOAD = shared_prefixes(120, num_systems=3, num_examples=3)


def test_with_room_for_everything_all_that_can_be_saved_is() -> None:
    figures = Replays(WORKLOAD, LIMITS).one_group(10_000, 0)
    assert figures.saved == figures.plain == figures.oracle == figures.unlimited > 0


def test_with_little_room_the_oracle_saves_most_and_every_run_the_same() -> None:
    replays = Replays(WORKLOAD, LIMITS)
    figures = replays.one_group(400, 100)
    assert figures.plain < figures.saved <= figures.oracle < figures.unlimited
    assert replays.one_group(400, 100) == figures


def test_four_groups_save_no_more_than_one_with_their_memory_that_knows_the_future() -> None:
    figures = Replays(WORKLOAD, LIMITS).four_groups(400)
    assert 0 < figures.saved <= figures.pooled <= figures.unlimited


def test_a_trace_is_read_at_its_scale(tmp_path: Path) -> None:
    entries = [
        {"timestamp": 0, "input_length": 1100, "output_length": 90, "hash_ids": [0, 1, 2]},
        {"timestamp": 5, "input_length": 20, "output_length": 1, "hash_ids": [9]},
        {"timestamp": 9, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    workload = conversation_trace(path)
    assert [len(ask.prompt) for ask in workload.asks] == [34, 32], "the one of 20 tokens is none"
    assert [ask.num_output_tokens for ask in workload.asks] == [2, 1]
    saved = Replays(replace(workload, asks=workload.asks), LIMITS).one_group(100, 0)
    assert saved.saved == 16, "the block with the last token is computed again"
