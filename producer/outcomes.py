"""What the server holds of requests that have ended: results, whole or pieced together.

A group that ends a request stores all of its output with the result. One that ends while no group
has it (cancelled in the queue, out of attempts) has its output in its journal alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from redis.asyncio import Redis

from wire.errors import ResultGone, WireError
from wire.ids import RequestId
from wire.keys import Keys
from wire.messages import Result
from wire.records import RESULT_FIELDS, read_journal, result_from_record
from wire.streams import Entry, entries_of_all

Outcome: TypeAlias = Result | ResultGone | WireError | None
"""A request's result; why there is none to be had; or None while the request goes on."""


async def fetch_results(
    client: Redis, keys: Keys, request_ids: Sequence[RequestId]
) -> list[Outcome]:
    """What the records say of each request; what it had generated is filled in from its journal.

    The latter for one that ended while no group had it: only its journal knows.
    """
    if not request_ids:
        return []
    async with client.pipeline(transaction=False) as pipe:
        for request_id in request_ids:
            pipe.hmget(keys.request(request_id), *RESULT_FIELDS)
        records = await pipe.execute()
    outcomes = [
        _outcome(request_id, record)
        for request_id, record in zip(request_ids, records, strict=True)
    ]
    partial = {
        index: outcome
        for index, (outcome, record) in enumerate(zip(outcomes, records, strict=True))
        if isinstance(outcome, Result) and not outcome.token_ids and _num_journaled(record)
    }
    if partial:
        filled = await _with_journals(client, keys, list(partial.values()))
        for index, result in zip(partial, filled, strict=True):
            outcomes[index] = result
    return outcomes


def _num_journaled(record: Sequence[bytes | None]) -> int:
    return int(record[RESULT_FIELDS.index("num_journaled")] or 0)


def _outcome(request_id: RequestId, record: Sequence[bytes | None]) -> Outcome:
    if record[RESULT_FIELDS.index("state")] is None:
        return ResultGone(
            f"the server knows no request {request_id!r}: it was never submitted; or its result "
            "was kept for its time (FOREBAY_RESULT_TTL_S) and is gone; or the server lost it, as "
            "one that is flushed does, or one that crashed within a second of accepting it: then "
            "submit it again"
        )
    try:
        return result_from_record(request_id, record)
    except WireError as error:
        unreadable = WireError(f"the result of request {request_id!r} cannot be read: {error}")
        unreadable.__cause__ = error
        return unreadable


async def _with_journals(client: Redis, keys: Keys, results: Sequence[Result]) -> list[Result]:
    journals = await entries_of_all(client, [keys.journal(r.request_id) for r in results])
    return [_filled(result, journal) for result, journal in zip(results, journals, strict=True)]


def _filled(result: Result, journal: Sequence[Entry]) -> Result:
    try:
        journaled = read_journal(journal)
    except WireError:
        return result  # the result stands by itself; what went before it is past reading
    if not journaled.token_ids:
        return result
    return replace(
        result,
        token_ids=journaled.token_ids,
        text=journaled.text,
        logprobs=journaled.logprobs,
    )
