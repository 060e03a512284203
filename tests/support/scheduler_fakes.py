"""Sequences and iteration schedulers without an engine around them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from cache.prefix_hash import PrefixHasher
from cache.tiers import TieredCache
from gpu_worker.engine.iteration_scheduler import IterationScheduler
from gpu_worker.engine.sequence import Sequence
from support.engine_fakes import assignment

BLOCK_SIZE = 4

_HASHER = PrefixHasher(model="m", cache_format="f", salt=b"", block_size=BLOCK_SIZE)
_indices = count()


def sequence_of(name: str, prompt: Iterable[int]) -> Sequence:
    return Sequence(
        next(_indices),
        assignment(name, prompt),
        seed=0,
        stop_token_ids=frozenset(),
        max_num_tokens=1000,
        hasher=_HASHER,
    )


def sequence(name: str, num_prompt_tokens: int, *, first_token: int = 0) -> Sequence:
    return sequence_of(name, range(first_token, first_token + num_prompt_tokens))


def scheduler(
    *,
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    budget: int = 16,
    caching: bool = True,
    num_slots: int = 0,
) -> IterationScheduler:
    return IterationScheduler(
        TieredCache(num_blocks, BLOCK_SIZE, num_slots),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
    )


def step(of: IterationScheduler) -> dict[str, int]:
    """One step in which every sequence that is complete gets a token; what ran, by name."""
    schedule = of.schedule()
    of.cache.take_copies()
    of.complete(schedule)
    for seq in schedule:
        if seq.num_uncomputed == 0:
            seq.append(0)
    return {seq.request_id: num_tokens for seq, num_tokens in schedule.items()}
