"""Requests and groups as the scheduler's policies see them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from cache.prefix_hash import PrefixHasher
from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.pending import ReadyRequest
from wire.ids import GroupId, RequestId, token_ids
from wire.messages import GroupStatus, Priority, Prompt, Request
from wire.records import Journaled
from wire.scripts import Queued

BLOCK_SIZE = 4
CACHE_FORMAT = "f"
_HASHER = PrefixHasher(model="m", cache_format=CACHE_FORMAT, salt=b"", block_size=BLOCK_SIZE)
_NUMBERS = count()


def ready(
    tokens: Sequence[int] = (1, 2, 3),
    *,
    name: str | None = None,
    priority: Priority = "standard",
    at_s: float = 0.0,
    deadline_ms: int | None = None,
    num_journaled: int = 0,
) -> ReadyRequest:
    request_id = RequestId(name or f"r{next(_NUMBERS)}")
    ids = token_ids(tokens)
    return ReadyRequest(
        Queued(request_id, 0, priority, f"{next(_NUMBERS)}-0".encode()),
        Request(request_id, Prompt(token_ids=ids), priority=priority),
        "m",
        ids,
        {CACHE_FORMAT: tuple(_HASHER.hash_blocks(ids))},
        Journaled(token_ids([9] * num_journaled)),
        submitted_s=at_s,
        ready_s=at_s,
        deadline_ms=deadline_ms,
    )


def group(
    name: str = "g",
    *,
    credits: int = 8,
    num_owned: int = 0,
    model: str = "m",
    draining: bool = False,
    transfer_address: str | None = None,
) -> GroupView:
    status = GroupStatus(
        GroupId(name),
        1,
        model,
        1,
        credits,
        "draining" if draining else "healthy",
        cache_format=CACHE_FORMAT,
        transfer_address=transfer_address,
    )
    return GroupView(status, num_owned)


def fleet(*groups: GroupView) -> FleetView:
    return FleetView({group.key: group for group in groups})
