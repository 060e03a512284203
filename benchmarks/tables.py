"""Output for people; programs read the line of JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def say(line: str) -> None:
    """Progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def seconds(figures: Mapping[str, Any]) -> str:
    """A median with its extremes."""
    return f"{figures['wall_s']:.2f} ({figures['wall_min_s']:.2f}-{figures['wall_max_s']:.2f})"


def shares(agreement: Mapping[str, float] | None) -> str:
    """How far tokens agree with a reference."""
    if agreement is None:
        return "-"
    first, leading = agreement["first_token"], agreement["leading_tokens"]
    return f"first {first:.1%}, leading {leading:.1%}"
