"""What a run must have left on its server: one end for each request, and nothing else behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wire.codec import decode
from wire.ids import RequestId
from wire.keys import DISPATCHERS, Keys
from wire.messages import Chunk, Result
from wire.records import RESULT_FIELDS, TERMINAL_STATES, result_from_record


def look_for_leftovers(client: Any, keys: Keys) -> list[str]:
    """What is there that no finished work leaves."""
    found = []
    for priority, key in keys.intakes.items():
        pending = client.xpending(key, DISPATCHERS) if client.exists(key) else {"pending": 0}
        if (num_queued := client.xlen(key)) or pending["pending"]:
            found.append(
                f"{num_queued} entries are in the {priority} intake, the first of them "
                f"{client.xrange(key, count=1)}; {client.xinfo_groups(key)}; {pending}"
            )
    if num_delayed := client.zcard(keys.delayed):
        found.append(f"{num_delayed} requests are delayed")
    for key in client.scan_iter(f"{keys.prefix}:group:*:owned", count=1000):
        found.append(f"{key.decode()} still holds {client.smembers(key)}")
    for key in client.scan_iter(count=1000):
        if client.pttl(key) == -1:
            found.append(f"{key.decode()} has no time to live")
    return found


def dead_letters(client: Any, keys: Keys) -> set[str]:
    """The ids of the requests that were given up."""
    return {request_id.decode() for request_id in client.zrange(keys.dead_letters, 0, -1)}


def check_records(
    client: Any, keys: Keys, seen: Mapping[RequestId, Result], *, lossy: bool
) -> list[str]:
    """Where the server and those who read the results do not agree, or there is more than one end.

    A `lossy` server may have come to an end twice, or have forgotten a request, its end included,
    when somebody had been told of it already.
    """
    found = []
    for request_id, result in seen.items():
        fields = client.hmget(keys.request(request_id), *RESULT_FIELDS)
        stored = result_from_record(request_id, fields)
        journal = client.xrange(keys.journal(request_id))
        ends = [entry[b"state"] for _, entry in journal if b"state" in entry]
        if lossy and fields[RESULT_FIELDS.index("state")] is None:
            continue
        if stored is None:
            found.append(f"{request_id} has ended as {result.state}, but its record has not")
        elif len(ends) != 1 or ends[0].decode() not in TERMINAL_STATES:
            found.append(f"the journal of {request_id} ends like this: {ends}")
        elif flaw := _flaw_in([entry[b"chunk"] for _, entry in journal if b"chunk" in entry]):
            found.append(f"the journal of {request_id} {flaw}")
        elif not lossy and (stored.state, stored.finished_ms) != (result.state, result.finished_ms):
            found.append(f"{request_id} was read as {result}, but is stored as {stored}")
    return found


def _flaw_in(chunks: Sequence[bytes]) -> str | None:
    """What is wrong with what is left of a journal, if anything is."""
    reached, fence = 0, 0
    for chunk in (decode(Chunk, data) for data in chunks):
        if chunk.offset != reached:
            return f"goes on with token {chunk.offset} where {reached} was reached"
        if chunk.fence < fence:
            return f"has a chunk of {chunk.fence} behind one of {fence}"
        reached, fence = chunk.offset + len(chunk.token_ids), chunk.fence
    return None
