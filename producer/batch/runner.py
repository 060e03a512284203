"""The batch run: rows from a file go through a producer, and come out as they finish.

    input_rows --> not ended yet --> producer.submit_many --> output rows --> LineWriter
                      \\_____________ refused rows __________________/

Both ends are streams and the producer bounds what is between them, so memory does not grow with
the input. The input stays the source of truth, and the output says by custom_id which of its rows
have ended: a run always goes on from what is there (`producer/batch/resumption.py`), be it
nothing. So it may be killed at any point; the next one runs again at most what was in flight, and
takes over what goes on on a shared server (`producer/batch/run_id.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, closing
from dataclasses import dataclass

import structlog

from producer.batch.batch_producer import BatchProducer
from producer.batch.fields import Endpoint
from producer.batch.files import BatchFiles, open_files
from producer.batch.input_rows import input_rows
from producer.batch.mending import mend_files
from producer.batch.options import BatchOptions
from producer.batch.output import (
    JsonObject,
    answer_row,
    encode_line,
    failure_row,
    partial_completion,
)
from producer.batch.report import BatchProgress, BatchSummary, NoProgress
from producer.batch.resumption import Resumption, check_matched, find_ended
from producer.batch.row import BatchRow, RowFailure, check_row
from producer.batch.run_id import refused_id, submitted_id
from producer.batch.tally import Tally
from wire.errors import ForebayError
from wire.ids import RequestId
from wire.messages import Request, Result

log = structlog.get_logger(__name__)


async def run_batch(
    options: BatchOptions,
    producer: BatchProducer,
    progress: BatchProgress | None = None,
    *,
    files: BatchFiles | None = None,
    resumption: Resumption | None = None,
) -> BatchSummary:
    """Run the rows of the input that have not ended yet; each gets one row in the output.

    What is wrong with a row is written as that row's error. `files` and `resumption` are those of
    `options`, for a caller that opened them beforehand to fail early; they stay open. Raises
    ConfigError or FileError, and changes nothing, if the files cannot be used or gone on with;
    FileError if reading or writing fails on the way, and what the producer raises. Whatever ends
    a run, the rows written before stay, and the next run goes on from them.
    """
    if files is None:
        with open_files(options) as opened:
            return await run_batch(options, producer, progress, files=opened)
    if resumption is None:
        with closing(await find_ended(options, files)) as found:
            return await run_batch(options, producer, progress, files=files, resumption=found)
    return await _Run(options, files, progress or NoProgress(), resumption).run(producer)


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is kept of a row while its request is in flight."""

    row_number: int
    custom_id: str
    endpoint: Endpoint


class _Run:
    def __init__(
        self,
        options: BatchOptions,
        files: BatchFiles,
        progress: BatchProgress,
        resumption: Resumption,
    ) -> None:
        self._options = options
        self._files = files
        self._progress = progress
        self._resumption = resumption
        self._run_id = resumption.run_id
        self._in_flight: dict[RequestId, _Pending] = {}
        self._input_error: ForebayError | None = None
        self._tally = Tally(progress)

    async def run(self, producer: BatchProducer) -> BatchSummary:
        await self._begin()
        taking = asyncio.create_task(self._take_results(producer), name="take-results")
        try:
            # Being cancelled here does not reach the task: its producer would cancel what is in
            # flight before the note of its ids is gone.
            await asyncio.wait((taking,))
        finally:
            self._discard_note()
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        taking.result()
        if self._input_error is not None:
            raise self._input_error
        if self._in_flight:
            raise ForebayError(
                f"{len(self._in_flight)} rows got no result, the first of them row "
                f"{next(iter(self._in_flight.values())).row_number}; run them again"
            )
        check_matched(self._files, self._resumption.table)
        return self._tally.summary(self._options, self._resumption)

    async def _take_results(self, producer: BatchProducer) -> None:
        async with AsyncExitStack() as stack:
            requests = await stack.enter_async_context(aclosing(self._requests()))
            # A result is in the file by the time that it is forgotten; the server's memory would
            # otherwise grow with the input.
            results = producer.submit_many(
                requests, max_in_flight=self._options.max_in_flight, forget=True, adopt=True
            )
            if isinstance(results, AsyncGenerator):
                await stack.enter_async_context(aclosing(results))
            stack.callback(self._discard_note)  # should writing fail: again, first
            async for result in results:
                await self._finish(result)

    def _discard_note(self) -> None:
        if self._resumption.note is not None:
            with contextlib.suppress(OSError):  # then the results could not be written either
                self._resumption.note.discard()

    async def _begin(self) -> None:
        """Bring the files into order, and tell where the run starts."""
        found, notify = self._resumption, self._progress.on_notice
        if found.num_ended:
            self._progress.on_resumed(found.num_answered, found.num_failed)
        if found.num_edited:
            notify(
                f"rows edited since they were run: {found.num_edited}; they are not run again "
                f"(--restart runs all rows)"
            )
        if found.note is not None:
            try:
                found.note.write(found.run_id)
            except OSError as error:
                notify(
                    f"cannot write {found.note.path}: {error.strerror}; should this run be killed, "
                    f"the next one will compute again what was in flight"
                )
        await mend_files(self._files, found, notify)
        if found.num_to_retry:
            notify(f"failed rows that are run again: {found.num_to_retry}")

    async def _requests(self) -> AsyncGenerator[Request, None]:
        """The rows that are left and can be submitted; refused ones are written on the way.

        If reading fails, the input ends early: what was submitted before still gets its results,
        and then the error is raised.
        """
        table = self._resumption.table
        try:
            rows = input_rows(
                self._files.reader, table, max_line_bytes=self._options.max_line_bytes
            )
            async with aclosing(rows):
                async for line, loaded in rows:
                    self._tally.read(self._files.reader.used_fraction)
                    ended = table.find_ended(loaded.key)
                    if ended is not None and ended.stands:
                        continue
                    row = loaded if isinstance(loaded, RowFailure) else check_row(loaded)
                    if isinstance(row, RowFailure):
                        await self._fail(refused_id(self._run_id, row.row_number), row)
                    else:
                        assert line.content is not None
                        yield self._submission(row, submitted_id(self._run_id, line.content))
            self._tally.read_all()
        except ForebayError as error:
            self._input_error = error

    def _submission(self, row: BatchRow, request_id: RequestId) -> Request:
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
            # Submitted a second time, to a server that had lost the first: it has its row already.
            log.debug("result ignored", request_id=result.request_id, reason="it is not in flight")
            return
        self._tally.computed(result)
        if result.state != "done":
            partial = partial_completion(row.endpoint, result)
            await self._fail(result.request_id, _failure(row, result), partial)
            return
        await self._files.output.append(
            encode_line(answer_row(row.custom_id, row.endpoint, result))
        )
        self._tally.answered()

    async def _fail(
        self, request_id: RequestId, failure: RowFailure, partial: JsonObject | None = None
    ) -> None:
        await self._files.errors.append(encode_line(failure_row(request_id, failure, partial)))
        self._tally.failed(failure)


def _failure(row: _Pending, result: Result) -> RowFailure:
    if result.error is None:
        return RowFailure(
            row.row_number, row.custom_id, result.state, f"the request was {result.state}"
        )
    error = result.error
    return RowFailure(row.row_number, row.custom_id, error.code, error.message, error.field)
