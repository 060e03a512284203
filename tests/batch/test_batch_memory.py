"""Memory stays flat however long the input is, and the ids already seen are found fast."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import psutil
from batch_fakes import FakeProducer, chat_row, write_rows

from producer.batch import BatchOptions, NoProgress, run_batch
from producer.batch.row_table import RowTable

MIB = 2**20


class MemoryWatch(NoProgress):
    """Notes by how much memory grows while a run goes on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.growth_bytes = 0

    def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
        if num_rows % 5000 == 0:
            growth = self._process.memory_info().rss - self._before
            self.growth_bytes = max(self.growth_bytes, growth)


async def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", (chat_row(f"row-{i}") for i in range(100_000)))
    options = BatchOptions(source, str(tmp_path / "out.jsonl"))
    watch = MemoryWatch()
    summary = await run_batch(options, FakeProducer(remember=False), watch)
    assert summary.num_succeeded == 100_000
    assert watch.growth_bytes < 50 * MIB


async def test_memory_does_not_grow_with_what_is_done_already(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", (chat_row(f"row-{i}") for i in range(100_000)))
    ended: dict[str, object] = {"id": "x", "response": {}, "error": None}
    write_rows(tmp_path / "out.jsonl", ({"custom_id": f"row-{i}", **ended} for i in range(99_000)))
    options = BatchOptions(source, str(tmp_path / "out.jsonl"))
    watch = MemoryWatch()
    summary = await run_batch(options, FakeProducer(remember=False), watch)
    assert (summary.num_resumed, summary.num_succeeded) == (99_000, 1000)
    assert watch.growth_bytes < 50 * MIB


def test_a_hundred_thousand_ids_are_noted_within_some_seconds() -> None:
    with closing(RowTable()) as seen:
        start_s = time.perf_counter()
        for row_number in range(100_000):
            assert seen.note_id(f"row-{row_number}", row_number) is None
        assert time.perf_counter() - start_s < 5  # 0.4 s on an idle machine
        assert seen.note_id("row-77", 100_000) == 77
