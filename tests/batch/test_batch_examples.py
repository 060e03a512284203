"""The example that the README runs is one that the parser takes, row by row."""

from __future__ import annotations

from pathlib import Path

from producer.batch import BatchRow, parse_row

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


def test_the_example_prompts_are_good_rows_of_many_kinds() -> None:
    rows = [parse_row(line, i + 1) for i, line in enumerate(PROMPTS.read_bytes().splitlines())]
    good = [row for row in rows if isinstance(row, BatchRow)]
    assert len(good) == len(rows) == 32
    assert len({row.custom_id for row in good}) == 32
    assert all(24 <= (row.sampling.max_tokens or 0) <= 160 for row in good)
    assert any(row.sampling.stop for row in good)
    assert any(row.sampling.logprobs for row in good)
    openings = [row.prompt.messages[0] for row in good if row.prompt.messages]
    assert len(openings) - len(set(openings)) >= 6  # shared system prompts
