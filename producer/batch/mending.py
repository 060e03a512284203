"""Making the output files what a run can go on from: whole rows that stand, and nothing else."""

from __future__ import annotations

from contextlib import aclosing, closing

from producer.batch.files import BatchFiles
from producer.batch.resumption import Resumption
from producer.batch.writer import LineWriter, Notify
from producer.batch.written_row import read_written


async def mend_files(files: BatchFiles, resumption: Resumption, notify: Notify) -> None:
    """Take out torn rows, failed ones that are to run again, and all of them for a restart.

    Killed at any point, it leaves what the next run can go on from: each step is done or not, and
    the results are the last to change. Raises FileError.
    """
    states = list(zip(files.writers, resumption.states, strict=True))
    for writer, state in reversed(states):
        writer.start(notify, keep_bytes=state.keep_bytes)
        if state.torn_bytes:
            notify(
                f"{writer.name} ended in the middle of a row: its {state.torn_bytes} bytes are "
                f"removed, and the row is run again"
            )
        if state.num_to_retry:
            await _drop_failed(writer)
        elif state.lacks_break:
            await writer.append(b"\n")


async def _drop_failed(writer: LineWriter) -> None:
    """Rewrite a file without the rows that failed; until that is done, it stays as it is."""
    successor = writer.successor()
    try:
        with closing(writer.read_back()) as reader:
            async with aclosing(reader.lines()) as lines:
                async for line in lines:
                    row = read_written(line.content or b"")
                    if row is not None and not row.is_failure:
                        await successor.append((line.content or b"") + b"\n")
        writer.become(successor)
    except BaseException:
        successor.abandon()
        raise
