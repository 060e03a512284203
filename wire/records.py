"""Reading what Redis holds of a request: its record and its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from wire.codec import decode
from wire.errors import ForebayError, InvalidRequest, RequestFailed, WireError
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import Chunk, ErrorInfo, Result, TerminalState, TokenLogprob

TERMINAL_STATES: frozenset[str] = frozenset({"done", "failed", "cancelled", "expired"})

RESULT_FIELDS = ("state", "result", "submitted_ms", "finished_ms", "num_journaled")
"""What `result_from_record` wants, for HMGET."""


def result_from_record(request_id: RequestId, fields: Sequence[bytes | None]) -> Result | None:
    """The result in a record's RESULT_FIELDS, None while the request goes on.

    Id and times are the record's: scripts store results whose makers did not know them.
    """
    state, data, submitted_ms, finished_ms, _ = fields
    if state is None or state.decode() not in TERMINAL_STATES:
        return None
    return replace(
        decode(Result, data or b""),
        request_id=request_id,
        submitted_ms=int(submitted_ms or 0),
        finished_ms=int(finished_ms or 0),
    )


def ending(
    state: TerminalState, error: ForebayError | None = None, *, model: str | None = None
) -> Result:
    """The result of a request that ends without tokens, for `encode`; the record adds its id."""
    return Result(
        RequestId(""), state, model=model, error=None if error is None else error_info(error)
    )


def error_info(error: ForebayError) -> ErrorInfo:
    """An error as a result carries it; RequestFailed stands for its reason."""
    field = error.field if isinstance(error, InvalidRequest) else None
    code = error.reason if isinstance(error, RequestFailed) else error.code
    return ErrorInfo(code, str(error), field)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One entry of a journal: new tokens, or the end of the request."""

    entry_id: bytes
    chunk: Chunk | None
    state: TerminalState | None


def journal_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> JournalEntry:
    """Decode a journal's stream entry. Raises WireError for one that is neither."""
    if b"chunk" in fields:
        return JournalEntry(entry_id, decode(Chunk, fields[b"chunk"]), None)
    state = fields.get(b"state", b"").decode()
    if state not in TERMINAL_STATES:
        raise WireError(f"journal entry {entry_id.decode()} is neither a chunk nor an end")
    return JournalEntry(entry_id, None, cast("TerminalState", state))


@dataclass(slots=True)
class Journaled:
    """What a journal holds of a request's output: where the next attempt goes on from."""

    token_ids: TokenIds = field(default_factory=token_ids)
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None

    @classmethod
    def of(cls, entries: Iterable[JournalEntry]) -> Journaled:
        """Put the chunks together. Raises WireError where one is missing."""
        journaled = cls()
        logprobs: list[TokenLogprob] = []
        for chunk in (entry.chunk for entry in entries if entry.chunk is not None):
            if chunk.offset != len(journaled.token_ids):
                raise WireError(
                    f"journal has {len(journaled.token_ids)} tokens where a chunk for "
                    f"{chunk.offset} follows"
                )
            journaled.token_ids.extend(chunk.token_ids)
            journaled.text += chunk.text
            logprobs += chunk.logprobs or ()
        journaled.logprobs = tuple(logprobs) or None
        return journaled


def read_journal(entries: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> Journaled:
    """What a journal's stream entries hold. Raises WireError for what is no journal."""
    return Journaled.of(journal_entry(entry_id, fields) for entry_id, fields in entries)
