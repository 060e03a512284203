"""Memory stays flat however long the input is, and the ids already seen are found fast."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import psutil
from batch_fakes import FakeProducer, chat_row, write_rows

from producer.batch import BatchOptions, run_batch
from producer.batch.seen_ids import SeenIds

MIB = 2**20


async def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", (chat_row(f"row-{i}") for i in range(100_000)))
    process = psutil.Process()
    before = process.memory_info().rss
    most = before

    class Watch:
        def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
            nonlocal most
            if num_rows % 5000 == 0:
                most = max(most, process.memory_info().rss)

        def on_done(self, *counts: int) -> None: ...

        def on_failure(self, failure: object) -> None: ...

    summary = await run_batch(
        BatchOptions(source, str(tmp_path / "out.jsonl")), FakeProducer(remember=False), Watch()
    )
    assert summary.num_succeeded == 100_000
    assert most - before < 50 * MIB


def test_a_hundred_thousand_ids_are_noted_within_some_seconds() -> None:
    with closing(SeenIds()) as seen:
        start_s = time.perf_counter()
        for row_number in range(100_000):
            assert seen.add(f"row-{row_number}", row_number) is None
        assert time.perf_counter() - start_s < 5  # 0.4 s on an idle machine
        assert seen.add("row-77", 100_000) == 77
