"""The batch run: rows from a file go through a producer, and come out as they finish.

    LineReader -> parse_row -> SeenIds -> producer.submit_many -> output rows -> LineWriter
                       \\___________ refused rows ______________________/

Both ends are streams and the producer bounds what is between them, so memory does not grow with
the input. The input stays the source of truth: a row's request id is the run's id and the row's
number, and the output names each row by its custom_id.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing, closing
from dataclasses import dataclass
from typing import Protocol

from producer.batch.fields import Endpoint
from producer.batch.options import BatchFiles, BatchOptions, open_files
from producer.batch.output import answer_row, encode_line, failure_row
from producer.batch.reader import Line
from producer.batch.report import BatchProgress, BatchSummary, NoProgress
from producer.batch.row import BatchRow, RowFailure, parse_row
from producer.batch.seen_ids import SeenIds
from wire.errors import ForebayError, InvalidRequest
from wire.ids import RequestId
from wire.messages import Request, Result


class BatchProducer(Protocol):
    """The part of a producer that a run needs."""

    def submit_many(
        self,
        requests: AsyncIterable[Request] | Iterable[Request],
        *,
        max_in_flight: int = ...,
        forget: bool = ...,
    ) -> AsyncIterator[Result]:
        """Submit all of `requests`; their results in completion order, each exactly once.

        `forget` deletes each result from the server when the next one is asked for.
        """


async def run_batch(
    options: BatchOptions,
    producer: BatchProducer,
    progress: BatchProgress | None = None,
    *,
    files: BatchFiles | None = None,
) -> BatchSummary:
    """Run all rows of the input; what is wrong with a row is written as that row's error.

    `files` are those of `options`, for a caller that opened them beforehand to fail early; they
    stay open. Raises ConfigError if they cannot be used, ForebayError if reading or writing fails
    on the way, and what the producer raises. Whatever ends a run, the rows written before stay.
    """
    if files is None:
        with open_files(options) as opened:
            return await run_batch(options, producer, progress, files=opened)
    files.output.start()
    files.errors.start()
    with closing(SeenIds()) as seen:
        return await _Run(options, files, progress or NoProgress(), seen).run(producer)


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is kept of a row while its request is in flight."""

    row_number: int
    custom_id: str
    endpoint: Endpoint


class _Run:
    def __init__(
        self, options: BatchOptions, files: BatchFiles, progress: BatchProgress, seen: SeenIds
    ) -> None:
        self._options = options
        self._files = files
        self._progress = progress
        self._seen = seen
        self._run_id = uuid.uuid4().hex
        self._in_flight: dict[RequestId, _Pending] = {}
        self._input_error: ForebayError | None = None
        self._started_s = time.monotonic()
        self._first_answer_s: float | None = None
        self._num_rows = 0
        self._num_succeeded = 0
        self._failed_by_code: Counter[str] = Counter()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0

    async def run(self, producer: BatchProducer) -> BatchSummary:
        async with AsyncExitStack() as stack:
            requests = await stack.enter_async_context(aclosing(self._requests()))
            # A result is in the file by the time that it is forgotten; the server's memory would
            # otherwise grow with the input.
            results = producer.submit_many(
                requests, max_in_flight=self._options.max_in_flight, forget=True
            )
            if isinstance(results, AsyncGenerator):
                await stack.enter_async_context(aclosing(results))
            async for result in results:
                await self._finish(result)
        if self._input_error is not None:
            raise self._input_error
        if self._in_flight:
            raise ForebayError(
                f"{len(self._in_flight)} rows got no result, the first of them row "
                f"{next(iter(self._in_flight.values())).row_number}; run them again"
            )
        return self._summary()

    async def _requests(self) -> AsyncGenerator[Request, None]:
        """The rows that can be submitted; the others are written as failed on the way.

        If reading fails, the input ends early: what was submitted before still gets its results,
        and then the error is raised.
        """
        try:
            async with aclosing(self._files.reader.lines()) as lines:
                async for line in lines:
                    if line.content is not None and not line.content.strip():
                        continue
                    row = self._check(line)
                    self._num_rows += 1
                    self._progress.on_read(self._num_rows, self._estimated_rows())
                    if isinstance(row, RowFailure):
                        await self._fail(row)
                    else:
                        yield self._submission(row)
            self._progress.on_read(self._num_rows, self._num_rows)
        except ForebayError as error:
            self._input_error = error

    def _check(self, line: Line) -> BatchRow | RowFailure:
        if line.content is None:
            error = InvalidRequest(
                f"the line is {line.size_bytes} bytes long; the limit is "
                f"{self._options.max_line_bytes}: shorten it, or raise --max-line-bytes"
            )
            return RowFailure.of(line.number, None, error)
        row = parse_row(line.content, line.number)
        if row.custom_id is None:
            return row
        first_row = self._seen.add(row.custom_id, row.row_number)
        if first_row is None:
            return row
        error = InvalidRequest(
            f"custom_id is that of row {first_row} already; give each row one of its own",
            field="custom_id",
        )
        return RowFailure.of(row.row_number, row.custom_id, error)

    def _estimated_rows(self) -> int | None:
        fraction = self._files.reader.used_fraction
        return round(self._num_rows / fraction) if fraction else None

    def _request_id(self, row_number: int) -> RequestId:
        return RequestId(f"{self._run_id}-{row_number}")

    def _submission(self, row: BatchRow) -> Request:
        request_id = self._request_id(row.row_number)
        self._in_flight[request_id] = _Pending(row.row_number, row.custom_id, row.endpoint)
        return Request(
            request_id=request_id,
            prompt=row.prompt,
            sampling=row.sampling,
            model=row.model,
            priority="batch",
            tenant=self._options.tenant,
        )

    async def _finish(self, result: Result) -> None:
        row = self._in_flight.pop(result.request_id, None)
        if row is None:
            raise ForebayError(f"a result came for {result.request_id}, which has none to come")
        self._num_prompt_tokens += result.num_prompt_tokens
        self._num_output_tokens += len(result.token_ids)
        self._num_cached_tokens += result.num_cached_tokens
        if result.state != "done":
            await self._fail(_failure(row, result))
            return
        await self._files.output.append(
            encode_line(answer_row(row.custom_id, row.endpoint, result))
        )
        self._num_succeeded += 1
        if self._first_answer_s is None:
            self._first_answer_s = time.monotonic() - self._started_s
        self._tell_done()

    async def _fail(self, failure: RowFailure) -> None:
        line = encode_line(failure_row(self._request_id(failure.row_number), failure))
        await self._files.errors.append(line)
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

    def _summary(self) -> BatchSummary:
        return BatchSummary(
            num_rows=self._num_rows,
            num_succeeded=self._num_succeeded,
            failed_by_code=dict(self._failed_by_code),
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
            wall_s=time.monotonic() - self._started_s,
            first_answer_s=self._first_answer_s,
            output=self._options.output,
            errors=self._options.errors,
        )


def _failure(row: _Pending, result: Result) -> RowFailure:
    if result.error is None:
        return RowFailure(
            row.row_number, row.custom_id, result.state, f"the request was {result.state}"
        )
    error = result.error
    return RowFailure(row.row_number, row.custom_id, error.code, error.message, error.field)
