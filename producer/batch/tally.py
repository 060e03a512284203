"""What a run has done so far, told to its listener as it changes, and in the end as a summary."""

from __future__ import annotations

import time
from collections import Counter

from producer.batch.options import BatchOptions
from producer.batch.report import BatchProgress, BatchSummary
from producer.batch.resumption import Resumption
from producer.batch.row import RowFailure
from wire.messages import Result


class Tally:
    """Counts from the moment it is made."""

    def __init__(self, progress: BatchProgress) -> None:
        self._progress = progress
        self._started_s = time.monotonic()
        self._first_answer_s: float | None = None
        self._num_rows = 0
        self._num_succeeded = 0
        self._failed_by_code: Counter[str] = Counter()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0

    def read(self, used_fraction: float | None) -> None:
        """A row was read; with it, `used_fraction` of the input, if that is known."""
        self._num_rows += 1
        estimated_rows = round(self._num_rows / used_fraction) if used_fraction else None
        self._progress.on_read(self._num_rows, estimated_rows)

    def read_all(self) -> None:
        """The input has no more rows."""
        self._progress.on_read(self._num_rows, self._num_rows)

    def computed(self, result: Result) -> None:
        """A request ended; its row is still to be written."""
        self._num_prompt_tokens += result.num_prompt_tokens
        self._num_output_tokens += len(result.token_ids)
        self._num_cached_tokens += result.num_cached_tokens

    def answered(self) -> None:
        """A row was written that has an answer."""
        self._num_succeeded += 1
        if self._first_answer_s is None:
            self._first_answer_s = time.monotonic() - self._started_s
        self._tell_done()

    def failed(self, failure: RowFailure) -> None:
        """A row was written that has none."""
        self._failed_by_code[failure.code] += 1
        self._progress.on_failure(failure)
        self._tell_done()

    def _tell_done(self) -> None:
        self._progress.on_done(
            self._num_succeeded,
            self._failed_by_code.total(),
            self._num_prompt_tokens,
            self._num_output_tokens,
        )

    def summary(self, options: BatchOptions, resumption: Resumption) -> BatchSummary:
        """What came of the run."""
        return BatchSummary(
            num_rows=self._num_rows,
            num_resumed=resumption.num_ended,
            num_resumed_failed=resumption.num_failed,
            num_succeeded=self._num_succeeded,
            failed_by_code=dict(self._failed_by_code),
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
            wall_s=time.monotonic() - self._started_s,
            first_answer_s=self._first_answer_s,
            output=options.output,
            errors=options.errors,
        )
