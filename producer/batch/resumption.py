"""What earlier runs have left in the output files: which rows have ended, and what is to be mended.

    output files --> rows that have ended --.
                                            |--> every ended row must be one of the input;
    input ---------> its rows --------------'    those that have not ended are left to run

Nothing is changed here. (An input that cannot be read twice, a pipe, is compared as it is run;
what does not fit is only known at its end then.)
"""

from __future__ import annotations

from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Literal

from producer.batch.files import BatchFiles
from producer.batch.input_rows import input_rows
from producer.batch.options import BatchOptions
from producer.batch.reader import Line
from producer.batch.row_table import EndedRow, RowTable
from producer.batch.run_id import RunNote, line_digest, new_run_id
from producer.batch.written_row import WrittenRow, is_torn, read_written
from wire.errors import FileError


@dataclass(slots=True)
class FileState:
    """An output file: whole rows in `keep_bytes`, then perhaps one that is torn."""

    keep_bytes: int = 0
    torn_bytes: int = 0
    lacks_break: bool = False
    num_to_retry: int = 0


@dataclass(slots=True)
class Resumption:
    """Where a run stands before it starts, until `close`. `states` are those of `files.writers`.

    `num_answered` and `num_failed` rows have ended, and `num_edited` of them read otherwise in
    the input now. `num_left` rows are left to run, None if that is not known beforehand. `note`
    is None for an output that no later run can go on with.
    """

    states: list[FileState]
    note: RunNote | None
    table: RowTable = field(default_factory=RowTable)
    run_id: str = field(default_factory=new_run_id)
    num_answered: int = 0
    num_failed: int = 0
    num_edited: int = 0
    num_left: int | None = None

    def close(self) -> None:
        """Forget the rows."""
        self.table.close()

    @property
    def num_ended(self) -> int:
        """How many rows are not run again."""
        return self.num_answered + self.num_failed

    @property
    def num_to_retry(self) -> int:
        """How many failed rows are taken out, to be run again."""
        return sum(state.num_to_retry for state in self.states)


async def find_ended(options: BatchOptions, files: BatchFiles) -> Resumption:
    """Read what the output files hold. Raises FileError, naming the line, for what does not fit."""
    note = RunNote(files.output.path) if files.output.is_resumable else None
    noted = note.read() if note else None
    found = Resumption([FileState() for _ in files.writers], note)
    if options.restart:
        return found
    try:
        survey = _Survey(options, files, found)
        for index, writer in enumerate(files.writers):
            if writer.holds_bytes:
                await survey.read_output(index)
        if found.table.num_ended and files.reader.is_regular:
            await survey.read_input()
    except BaseException:
        found.close()
        raise
    if noted and files.output.was_there and not found.num_to_retry:
        found.run_id = noted
    return found


def check_matched(files: BatchFiles, table: RowTable) -> None:
    """Raise FileError if an ended row is none of the input's, which was read to its end."""
    unmatched = table.first_unmatched()
    if unmatched is None:
        return
    place = _place(files, unmatched.file_index, unmatched.line_number)
    if unmatched.has_custom_id:
        raise FileError(
            f"{place} has a custom_id that no row of {files.reader.name} has, so it comes from "
            f"another run; choose another path, or pass --restart to lose what is there"
        )
    raise FileError(
        f"{place} tells of a failed row that is another one in {files.reader.name} now; pass "
        f"--retry-failed to run again what failed, or --restart to run all rows"
    )


class _Survey:
    def __init__(self, options: BatchOptions, files: BatchFiles, found: Resumption) -> None:
        self._options = options
        self._files = files
        self._found = found

    async def read_output(self, file_index: int) -> None:
        state = self._found.states[file_index]
        with closing(self._files.writers[file_index].read_back()) as reader:
            async with aclosing(reader.lines()) as lines:
                async for line in lines:
                    row = self._row(file_index, line)
                    if row == "torn":
                        state.torn_bytes = line.size_bytes
                        continue  # it is the last one
                    state.keep_bytes += line.size_bytes + line.has_break
                    state.lacks_break = not line.has_break
                    if row is not None:
                        self._note(file_index, line.number, row)

    def _row(self, file_index: int, line: Line) -> WrittenRow | Literal["torn"] | None:
        """What a line of an output file is; None for a blank one."""
        if line.content is not None:
            row = read_written(line.content)
            if row is not None:
                return row
            if not line.has_break and is_torn(line.content):
                return "torn"
            if not line.content.strip():
                return None
        raise FileError(
            f"{_place(self._files, file_index, line.number)} is no row of a batch output, so "
            f"there is nothing to go on from; mend or remove the line, choose another path, or "
            f"pass --restart to lose what is there"
        )

    def _note(self, file_index: int, line_number: int, row: WrittenRow) -> None:
        place = _place(self._files, file_index, line_number)
        if self._files.writers[file_index] is not self._files.output and not row.is_failure:
            raise FileError(
                f"{place} is an answer, where only failed rows go; are the paths of the output "
                f"and the errors exchanged?"
            )
        stands = not (row.is_failure and self._options.retry_failed)
        if not stands:
            self._found.states[file_index].num_to_retry += 1
            if isinstance(row.key, int):
                return
        ended = EndedRow(file_index, line_number, stands, row.digest)
        before = self._found.table.note_ended(row.key, ended)
        if before is not None and before.stands and stands:
            other_place = _place(self._files, before.file_index, before.line_number)
            raise FileError(
                f"{place} stands for the same row as {other_place}; remove one of the two, pass "
                f"--retry-failed to have failed rows removed and run again, or --restart to run "
                f"all rows"
            )
        if stands and row.is_failure:
            self._found.num_failed += 1
        elif stands:
            self._found.num_answered += 1

    async def read_input(self) -> None:
        found, num_left = self._found, 0
        rows = input_rows(
            self._files.reader, found.table, max_line_bytes=self._options.max_line_bytes
        )
        async with aclosing(rows):
            async for line, row in rows:
                ended = found.table.find_ended(row.key)
                if ended is None or not ended.stands:
                    num_left += 1
                elif ended.digest is not None and line.content is not None:
                    found.num_edited += ended.digest != line_digest(line.content)
        check_matched(self._files, found.table)
        self._files.reader.rewind()
        found.num_left = num_left


def _place(files: BatchFiles, file_index: int, line_number: int) -> str:
    return f"line {line_number} of {files.writers[file_index].name}"
