"""How a batch run shows on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

    from producer.batch import BatchSummary, RowFailure

_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.1
_MAX_FAILURES_SHOWN = 20


class Progress:
    """A `BatchProgress` for people. Use it as a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_failures = 0
        self._bar = _bar(self._stream) if self._stream.isatty() else None
        self._started_s = self._last_line_s = time.monotonic()
        self._num_resumed = 0
        self._estimated_rows: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_resumed(self, num_answered: int, num_failed: int) -> None:
        """Say it, and count these rows as done without letting them flatter the rate."""
        self._num_resumed = num_answered + num_failed
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._num_resumed
        rows = "1 row was" if self._num_resumed == 1 else f"{self._num_resumed:,} rows were"
        failed = f", {num_failed:,} of them without an answer (--retry-failed runs these again)"
        self._say(f"resumed: {rows} done already{failed if num_failed else ''}")

    def on_notice(self, line: str) -> None:
        """Show it."""
        self._say(line)

    def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
        """Note how many rows there are to do."""
        self._estimated_rows = estimated_rows
        if self._bar is not None:
            self._bar.total = estimated_rows

    def on_done(
        self, num_succeeded: int, num_failed: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Show how far the run is; a bar has its own clock, lines come every few seconds."""
        num_done = num_succeeded + num_failed
        elapsed_s = time.monotonic() - self._started_s
        tokens_per_s = num_output_tokens / elapsed_s if elapsed_s > 0 else 0.0
        if self._bar is not None:
            self._bar.set_description("running", refresh=False)
            self._bar.set_postfix_str(
                f"{num_failed} failed, {tokens_per_s:.0f} tokens/s", refresh=False
            )
            self._bar.update(self._num_resumed + num_done - self._bar.n)
        elif time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._say(self._line(num_done, num_failed, elapsed_s, tokens_per_s))

    def on_failure(self, failure: RowFailure) -> None:
        """Show the first failures; the rest can be read where all of them are written."""
        self._num_failures += 1
        if self._num_failures <= _MAX_FAILURES_SHOWN:
            self._say(f"failed: {failure}")
        if self._num_failures == _MAX_FAILURES_SHOWN:
            self._say("further failures are only written to the file")

    def _line(self, num_done: int, num_failed: int, elapsed_s: float, tokens_per_s: float) -> str:
        rate = num_done / elapsed_s
        num_ended = self._num_resumed + num_done
        of = f"/{self._estimated_rows}" if self._estimated_rows is not None else ""
        resumed = f" ({self._num_resumed} resumed)" if self._num_resumed else ""
        eta = (
            f", about {(self._estimated_rows - num_ended) / rate:.0f} s left"
            if self._estimated_rows is not None and rate > 0
            else ""
        )
        return (
            f"{num_ended}{of} requests{resumed}, {num_failed} failed, {rate:.1f} requests/s, "
            f"{tokens_per_s:.0f} tokens/s{eta}"
        )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def _bar(terminal: TextIO) -> tqdm[Any]:
    # Imported late: most runs have no terminal, and nobody waits for the bar before they start.
    from tqdm import tqdm

    # tqdm's monitor is a thread that wakes bars which nobody updates; ours can wait.
    tqdm.monitor_interval = 0
    return tqdm(
        unit="req",
        file=terminal,
        dynamic_ncols=True,
        desc="loading",
        leave=False,
        mininterval=_BAR_EVERY_S,
    )


def summary_lines(summary: BatchSummary) -> list[str]:
    """The run in a few lines: requests, tokens, time, and where the answers are."""
    by_code = ", ".join(f"{n} {code}" for code, n in sorted(summary.failed_by_code.items()))
    failed = f"{summary.num_failed} failed" + (f" ({by_code})" if by_code else "")
    first = (
        f", the first answer after {summary.first_answer_s:.1f} s"
        if summary.first_answer_s is not None
        else ""
    )
    requests = f"{summary.num_succeeded} answered, {failed}"
    if summary.num_resumed:
        without = f" ({summary.num_resumed_failed} of them failed)"
        before = f"{summary.num_resumed} done before{without if summary.num_resumed_failed else ''}"
        requests = f"{before}, {requests}"
    lines = [
        f"requests  {summary.num_rows}: {requests}",
        f"tokens    {summary.num_prompt_tokens} in ({summary.num_cached_tokens} cached), "
        f"{summary.num_output_tokens} out, {summary.output_tokens_per_s:.1f} out/s",
        f"time      {summary.wall_s:.1f} s{first}",
        f"answers   {'standard output' if summary.output == '-' else summary.output}",
    ]
    if summary.errors is not None:
        lines.append(f"errors    {summary.errors}")
    return lines
