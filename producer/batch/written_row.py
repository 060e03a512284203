"""An output row read back: which row of the input it stands for, and whether it is an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from producer.batch.row import RowKey, row_key
from producer.batch.run_id import digest_in

_BEGINNING = b'{"id":"batch_req_'
_MAX_LINE_NUMBER = 2**63


@dataclass(frozen=True, slots=True)
class WrittenRow:
    """`key` is the input row's; `digest` that of its line, where the id tells it."""

    key: RowKey
    is_failure: bool
    digest: str | None


def read_written(line: bytes) -> WrittenRow | None:
    """The output row that a line holds; None if it holds anything else."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    custom_id, error = row.get("custom_id"), row.get("error")
    if custom_id is not None and not isinstance(custom_id, str):
        return None
    if isinstance(error, dict):
        key = _failed_key(custom_id, error)
    else:
        key = custom_id if error is None and isinstance(row.get("response"), dict) else None
    if key is None or key == "":
        return None
    return WrittenRow(key, is_failure=error is not None, digest=digest_in(row.get("id")))


def is_torn(rest: bytes) -> bool:
    """Whether `rest`, behind the last line break, is a row that was cut short while written.

    Anything else is somebody's text. (A crash of the machine may leave zeros behind what was
    written.)
    """
    written = rest.rstrip(b"\0")
    return written.startswith(_BEGINNING) or _BEGINNING.startswith(written)


def _failed_key(custom_id: str | None, error: dict[str, object]) -> RowKey | None:
    row_number, code = error.get("line"), error.get("code")
    if type(row_number) is not int or not 0 < row_number < _MAX_LINE_NUMBER:
        # Not needed where the custom_id says it; other programs write errors without it.
        row_number = 0
    key = row_key(row_number, custom_id, str(code))
    return None if key == 0 else key
