"""What a batch run is asked to do, and the files that it needs for it, checked before it starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from producer.batch.reader import LineReader
from producer.batch.writer import LineWriter
from wire.errors import ConfigError
from wire.messages import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """A batch run: `input` and `output` are paths, or "-" for standard input and output.

    Rows without an answer go to `errors`, or to the output among the others if it is None.
    Without `overwrite`, an output that already holds something is refused. `max_in_flight` bounds
    the requests that wait or run at a time, `max_line_bytes` what one input line may hold.
    """

    input: str
    output: str
    errors: str | None = None
    overwrite: bool = False
    max_in_flight: int = 256
    max_line_bytes: int = 8 * 1024 * 1024
    tenant: str = DEFAULT_TENANT

    def __post_init__(self) -> None:
        """Raise ConfigError for a bound below 1."""
        for name in ("max_in_flight", "max_line_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """The open files of a run. `errors` is the same writer as `output` if it has no own file."""

    reader: LineReader
    output: LineWriter
    errors: LineWriter


@contextmanager
def open_files(options: BatchOptions) -> Iterator[BatchFiles]:
    """Open a run's files, without changing what they hold, and close them in the end.

    Raises ConfigError, naming the file, if one cannot be opened, if two are the same, or if one
    would have to be overwritten. At the end, raises ForebayError if the disk fails to keep what
    was written.
    """
    with _closing_reader(options) as reader, _closing_writer(options.output, "results") as output:
        if options.errors is None:
            files = BatchFiles(reader, output, output)
            _check(options, files)
            yield files
        else:
            with _closing_writer(options.errors, "failed rows") as errors:
                files = BatchFiles(reader, output, errors)
                _check(options, files)
                yield files


@contextmanager
def _closing_reader(options: BatchOptions) -> Iterator[LineReader]:
    reader = LineReader(options.input, max_line_bytes=options.max_line_bytes)
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def _closing_writer(path: str, purpose: str) -> Iterator[LineWriter]:
    writer = LineWriter(path, purpose=purpose)
    try:
        yield writer
    finally:
        writer.close()


def _check(options: BatchOptions, files: BatchFiles) -> None:
    for writer in (files.output, files.errors):
        if _same_file(files.reader.status, writer.status):
            raise ConfigError(
                f"{writer.name} is the input and would be written to; choose another path"
            )
        if writer.holds_bytes and not options.overwrite:
            raise ConfigError(
                f"{writer.name} already holds {writer.holds_bytes} bytes; choose another path, or "
                f"pass --overwrite to lose what is in it"
            )
    if files.errors is not files.output and (
        options.output == options.errors or _same_file(files.output.status, files.errors.status)
    ):
        raise ConfigError(
            f"{files.output.name} is to take both results and failed rows; leave out --errors "
            f"for that, or choose another path"
        )


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    # Two names of /dev/null or of one terminal do no harm to each other.
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)
