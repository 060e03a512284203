"""What a batch run tells: progress on the way, and a summary at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from producer.batch.row import RowFailure


class BatchProgress(Protocol):
    """Who is told how a run goes. Called in the event loop, for every row: be quick, never raise.

    All numbers are totals since this run's start, so that a call may be skipped without harm.
    """

    def on_resumed(self, num_answered: int, num_failed: int) -> None:
        """Called once before all others, if earlier runs have done rows, which are not run again.

        They count in `on_read`, as rows of the input, and not in `on_done`.
        """

    def on_notice(self, line: str) -> None:
        """Called with something that whoever started the run should know, such as a full disk."""

    def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
        """Called when a row was read.

        `estimated_rows` is how many the input holds in all: extrapolated from its size while it
        is being read, exact in a last call at its end, None while nothing is known (a pipe).
        """

    def on_done(
        self, num_succeeded: int, num_failed: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Called when a row was written, answered or not."""

    def on_failure(self, failure: RowFailure) -> None:
        """Called when a row without an answer was written; `str(failure)` is one line."""


class NoProgress:
    """A listener for runs that nobody watches."""

    def on_resumed(self, num_answered: int, num_failed: int) -> None:
        """Ignore it."""

    def on_notice(self, line: str) -> None:
        """Ignore it."""

    def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
        """Ignore it."""

    def on_done(
        self, num_succeeded: int, num_failed: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Ignore it."""

    def on_failure(self, failure: RowFailure) -> None:
        """Ignore it."""


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What came of a run.

    `num_resumed` of the rows were done by earlier runs, `num_resumed_failed` of these without an
    answer; all numbers below these are this run's alone. `first_answer_s` counts from the run's
    start; None if nothing was answered. `num_cached_tokens` are those of the prompts that needed
    no computing. `output` and `errors` are the paths as they were given.
    """

    num_rows: int
    num_resumed: int
    num_resumed_failed: int
    num_succeeded: int
    failed_by_code: Mapping[str, int]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    wall_s: float
    first_answer_s: float | None
    output: str
    errors: str | None

    @property
    def num_failed(self) -> int:
        """How many rows this run has left without an answer."""
        return sum(self.failed_by_code.values())

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of the whole run."""
        return self.num_output_tokens / self.wall_s if self.wall_s > 0 else 0.0
