"""What a run must know of every row, in flat memory: tables on disk, with a small cache."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass

from producer.batch.row import RowKey
from wire.errors import ForebayError

_CACHE_KIB = 8192
_DIGEST_BYTES = 16  # two of a billion ids collide with a probability of 1e-21
_LINE_KEY_BYTES = 8


@dataclass(frozen=True, slots=True)
class EndedRow:
    """A row that an output file holds: on which line of which file, and what it is.

    `stands` is False for a failed row that is to be run again. `digest` is that of the input line
    that was run, None if that is not known.
    """

    file_index: int
    line_number: int
    stands: bool
    digest: str | None


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Ended rows that the input lacks: the first of them, and whether it has a custom_id."""

    file_index: int
    line_number: int
    has_custom_id: bool


class RowTable:
    """The custom_ids of the input, and the rows that have ended, until `close`.

    The tables are a temporary file of SQLite's, which nobody else can open and which is gone when
    the process is. Measured: 350,000 ids a second at first, 100,000 among millions. All methods
    raise ForebayError when the disk that holds temporary files is full.
    """

    def __init__(self) -> None:
        self.num_ended = 0  # of different keys, those included that are to be run again
        self._db = sqlite3.connect("", isolation_level=None)
        # Nothing here outlives the process, so nothing needs to survive a crash.
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._db.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._db.execute(
            "CREATE TABLE ended (key BLOB PRIMARY KEY, file INTEGER, line INTEGER,"
            " stands INTEGER, digest TEXT, found INTEGER) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Remove the tables."""
        self._db.close()

    def note_id(self, custom_id: str, row_number: int) -> int | None:
        """Note that a row of the input has `custom_id`; another row that had it before, or None."""
        digest = _key(custom_id)
        if self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", digest, row_number).rowcount:
            return None
        [first_row] = self._execute("SELECT row FROM seen WHERE digest = ?", digest).fetchone()
        return None if first_row == row_number else first_row

    def note_ended(self, key: RowKey, row: EndedRow) -> EndedRow | None:
        """Note that a row stands in an output file; what stood for it there before, or None.

        Of a row that is to be run again and one that stands, the latter stays noted.
        """
        digest = _key(key)
        values = (row.file_index, row.line_number, row.stands, row.digest)
        insert = f"INTO ended VALUES (?, {', '.join('?' * len(values))}, 0)"
        if self._execute(f"INSERT OR IGNORE {insert}", digest, *values).rowcount:
            self.num_ended += 1
            return None
        before, _ = self._look_up(digest)
        assert before is not None
        if not before.stands:
            self._execute(f"INSERT OR REPLACE {insert}", digest, *values)
        return before

    def find_ended(self, key: RowKey) -> EndedRow | None:
        """The row in an output file that stands for a row of the input, which it so matches."""
        if not self.num_ended:
            return None
        digest = _key(key)
        ended, was_found = self._look_up(digest)
        if ended is not None and not was_found:
            self._execute("UPDATE ended SET found = 1 WHERE key = ?", digest)
        return ended

    def first_unmatched(self) -> Unmatched | None:
        """An ended row that no row of the input was looked up for."""
        found = self._execute(
            "SELECT file, line, length(key) FROM ended WHERE found = 0 ORDER BY file, line LIMIT 1"
        ).fetchone()
        return found and Unmatched(found[0], found[1], found[2] != _LINE_KEY_BYTES)

    def _look_up(self, key: bytes) -> tuple[EndedRow, bool] | tuple[None, bool]:
        """The ended row of that key, and whether it was looked up before."""
        row = self._execute(
            "SELECT file, line, stands, digest, found FROM ended WHERE key = ?", key
        ).fetchone()
        if row is None:
            return None, False
        file_index, line_number, stands, digest, was_found = row
        return EndedRow(file_index, line_number, bool(stands), digest), bool(was_found)

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise ForebayError(
                f"cannot keep the list of custom_ids on disk: {error}; "
                f"free some space, or set SQLITE_TMPDIR to a directory that has it"
            ) from error


def _key(key: RowKey) -> bytes:
    if isinstance(key, int):
        return key.to_bytes(_LINE_KEY_BYTES)
    # Half of a surrogate pair can stand in a file that others wrote.
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
