"""The rows of the input, one after another, loaded as far as it takes to tell which row each is."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from producer.batch.reader import Line, LineReader
from producer.batch.row import DUPLICATE, LoadedRow, RowFailure, load_row
from producer.batch.row_table import RowTable
from wire.errors import InvalidRequest


async def input_rows(
    reader: LineReader, table: RowTable, *, max_line_bytes: int
) -> AsyncGenerator[tuple[Line, LoadedRow | RowFailure], None]:
    """Every row, with its line; blank lines are none.

    Of rows with one custom_id the first has it, and the others fail. Read a second time with the
    same `table`, the input gives the same rows. Raises FileError if reading fails on the way.
    """
    async with aclosing(reader.lines()) as lines:
        async for line in lines:
            if line.content is None:
                yield line, _too_long(line, max_line_bytes)
            elif line.content.strip():
                yield line, _unless_duplicate(load_row(line.content, line.number), table)


def _too_long(line: Line, max_line_bytes: int) -> RowFailure:
    error = InvalidRequest(
        f"the line is {line.size_bytes} bytes long; the limit is {max_line_bytes}: shorten it, "
        f"or raise --max-line-bytes"
    )
    return RowFailure.of(line.number, None, error)


def _unless_duplicate(row: LoadedRow | RowFailure, table: RowTable) -> LoadedRow | RowFailure:
    if row.custom_id is None:
        return row
    other_row = table.note_id(row.custom_id, row.row_number)
    if other_row is None:
        return row
    message = f"custom_id is that of row {other_row} already; give each row one of its own"
    return RowFailure(row.row_number, row.custom_id, DUPLICATE, message, "custom_id")
