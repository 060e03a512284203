"""Flags of a worker, passed through to whatever runs the engine."""

from __future__ import annotations

from collections.abc import Sequence

from service.settings import WorkerSettings


def engine_flags(words: Sequence[str]) -> dict[str, str]:
    """`--max-num-seqs 64 --dtype=float16` as fields of WorkerSettings. Raises ValueError."""
    fields: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if not name.startswith("--") or not (has_value or rest):
            raise ValueError(f"{word} is not a flag with a value")
        fields[name.removeprefix("--").replace("-", "_")] = value if has_value else rest.pop(0)
    return fields


def worker_settings(words: Sequence[str]) -> tuple[WorkerSettings, dict[str, str]]:
    """The settings that flags make, and what was given. Raises ConfigError, ValueError."""
    fields = engine_flags(words)
    return WorkerSettings.load(**fields), fields
