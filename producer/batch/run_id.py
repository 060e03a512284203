"""The ids of a run's requests, by which a run that goes on finds what it had in flight.

A killed run leaves requests on a server that others use too. The next run submits the same rows
under the same ids, is told that they are known, and gets the results of the first submission:
nothing is computed twice. A row's request id is therefore

    <run id>-<digest of its line>

A line that was edited in between has another digest, so it can never get the old line's answer.
The run id is random, and noted in a file beside the output (`answers.jsonl.forebay-run`) from
before the first submission until the run ends. Only a killed run leaves that note behind: one
that ends in any other way cancels what it has in flight, and deletes the note before it does, as
a run that goes on must not take the cancellations for its results. The id is a new one, too, for
a new output, with `restart`, and where failed rows are run again: what has failed stays on the
server for a while.

Losing the note costs computing what was in flight once more, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re

from wire.errors import FileError
from wire.ids import RequestId

_RUN_ID_BYTES = 8
_DIGEST_BYTES = 12
_SUFFIX = ".forebay-run"
_NOTE = re.compile(rb"([0-9a-f]{16})\n")
_ROW_ID = re.compile(r"batch_req_[0-9a-f]{16}-([0-9a-f]{24})")


def new_run_id() -> str:
    """A random one."""
    return os.urandom(_RUN_ID_BYTES).hex()


def line_digest(line: bytes) -> str:
    """What stands for an input line in the ids of its request and of its output row."""
    return hashlib.blake2b(line.strip(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_in(row_id: object) -> str | None:
    """The line's digest out of the `id` of an output row; None for an id of another kind."""
    found = _ROW_ID.fullmatch(row_id) if isinstance(row_id, str) else None
    return found and found[1]


def submitted_id(run_id: str, line: bytes) -> RequestId:
    """The request id of a row that is submitted."""
    return RequestId(f"{run_id}-{line_digest(line)}")


def refused_id(run_id: str, row_number: int) -> RequestId:
    """The id of a row that cannot be submitted; lines that were refused may well be alike."""
    return RequestId(f"{run_id}-{row_number}")


class RunNote:
    """The file beside the output at `output_path` that holds the id of the run that writes it."""

    def __init__(self, output_path: str) -> None:
        self.path = os.path.realpath(output_path) + _SUFFIX

    def read(self) -> str | None:
        """The run id that a killed run left; None if there is none, or no whole one.

        Raises FileError if a file of that name holds something else: it is not ours to replace.
        """
        try:
            with open(self.path, "rb") as file:
                content = file.read(4096)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror}; move it away") from error
        if (noted := _NOTE.fullmatch(content)) is not None:
            return noted[1].decode()
        # A crash of the machine may leave it empty, of zeros, or cut short.
        if re.fullmatch(rb"[0-9a-f]{0,16}\0*", content):
            return None
        raise FileError(
            f"{self.path} is where the id of the run is noted, and holds something else; "
            f"move it away, or choose another path for the output"
        )

    def write(self, run_id: str) -> None:
        """Note `run_id` alone. Raises OSError, and then nothing is noted."""
        if self.read() == run_id:
            return
        self.discard()
        with open(self.path, "wb") as file:
            file.write(f"{run_id}\n".encode())

    def discard(self) -> None:
        """Delete the file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
