"""The files that a batch run needs, opened, locked and checked before it starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from producer.batch.options import BatchOptions
from producer.batch.reader import LineReader
from producer.batch.writer import LineWriter
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """The open files of a run. `errors` is the same writer as `output` if it has no own file."""

    reader: LineReader
    output: LineWriter
    errors: LineWriter

    @property
    def writers(self) -> tuple[LineWriter, ...]:
        """Each file that is written, once."""
        return (self.output,) if self.errors is self.output else (self.output, self.errors)


@contextmanager
def open_files(options: BatchOptions) -> Iterator[BatchFiles]:
    """Open a run's files, without changing what they hold, and close them in the end.

    Meanwhile no other run can open those that are written. Raises FileError, naming the file, if
    one cannot be opened or another run writes it, ConfigError if two are the same or one cannot
    be gone on with. At the end, raises FileError if the disk fails to keep what was written.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(
            closing(LineReader(options.input, max_line_bytes=options.max_line_bytes))
        )
        output = stack.enter_context(closing(LineWriter(options.output, purpose="results")))
        errors = output
        if options.errors is not None:
            errors = stack.enter_context(closing(LineWriter(options.errors, purpose="failed rows")))
        files = BatchFiles(reader, output, errors)
        _check(options, files)
        for writer in files.writers:
            writer.claim()
        yield files


def _check(options: BatchOptions, files: BatchFiles) -> None:
    for writer in files.writers:
        if _same_file(files.reader.status, writer.status):
            raise ConfigError(
                f"{writer.name} is the input and would be written to; choose another path"
            )
    if files.errors is not files.output and (
        options.output == options.errors or _same_file(files.output.status, files.errors.status)
    ):
        raise ConfigError(
            f"{files.output.name} is to take both results and failed rows; leave out --errors "
            f"for that, or choose another path"
        )
    if files.output.is_resumable:
        return
    if options.retry_failed:
        raise ConfigError(
            f"--retry-failed needs an output to go on with, and {files.output.name} cannot be "
            f"read back: leave it out, or write the results to a file"
        )
    if files.errors.holds_bytes and not options.restart:
        raise ConfigError(
            f"{files.errors.name} holds {files.errors.holds_bytes} bytes of another run, which "
            f"results on {files.output.name} cannot go on from: choose another path for --errors, "
            f"or pass --restart to lose what is in it"
        )


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    # Two names of /dev/null or of one terminal do no harm to each other.
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)
