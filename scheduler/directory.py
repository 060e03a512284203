"""Asking the directory, in Redis, what the groups have cached of the prompts that go out next."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import structlog
from redis.exceptions import RedisError

from scheduler.policy.fleet_view import FleetView
from scheduler.policy.pending import ReadyRequest
from scheduler.policy.planning import CachedPrefixes
from wire.ids import BlockHash, RequestId
from wire.scripts import CachedPrefix, Scripts

log = structlog.get_logger(__name__)

TIMEOUT_S = 0.05
MAX_LOOKS = 5_000
"""So many looks into groups' sets in one call, at most: some three milliseconds of the server's."""


class Directory:
    """One question for all requests of a plan; only a great many of them take several calls."""

    def __init__(self, scripts: Scripts, *, timeout_s: float = TIMEOUT_S) -> None:
        self._scripts = scripts
        self._timeout_s = timeout_s
        self._answers = True

    async def ask(self, requests: Sequence[ReadyRequest], fleet: FleetView) -> CachedPrefixes:
        """What each group has of each request's prompt.

        What the server does not answer in time is missing: routing goes on without it.
        """
        found: dict[RequestId, dict[str, CachedPrefix]] = {}
        # The last hash of a chain stands for all of it: equal prompts are asked for once.
        chains: dict[BlockHash, Sequence[BlockHash]] = {}
        waiting: dict[BlockHash, list[RequestId]] = {}
        for request in requests:
            for chain in filter(None, request.chains.values()):
                chains[chain[-1]] = chain
                waiting.setdefault(chain[-1], []).append(request.request_id)
        try:
            async with asyncio.timeout(self._timeout_s):
                for part in _parts(chains, num_groups=len(fleet.groups)):
                    packed = [b"".join(chains[last]) for last in part]
                    answers = await self._scripts.directory_query(packed)
                    for last, answer in zip(part, answers, strict=True):
                        for request_id in waiting[last]:
                            found.setdefault(request_id, {}).update(answer)
        except (RedisError, TimeoutError) as error:
            if self._answers:
                log.warning("directory does not answer", error=str(error) or "not in time")
            self._answers = False
        else:
            self._answers = True
        return found


def _parts(
    chains: dict[BlockHash, Sequence[BlockHash]], *, num_groups: int
) -> Iterator[list[BlockHash]]:
    """The chains, by their last hashes, in parts that the server answers in a few milliseconds."""
    part: list[BlockHash] = []
    num_looks = 0
    for last, chain in chains.items():
        looks = num_groups * (1 + len(chain).bit_length())
        if part and num_looks + looks > MAX_LOOKS:
            yield part
            part, num_looks = [], 0
        part.append(last)
        num_looks += looks
    if part:
        yield part
