"""Sequences and iteration schedulers without an engine around them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from cache.block_pool import BlockPool
from cache.prefix_hash import PrefixHasher
from gpu_worker.engine.host_tier import HostTier
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


def eager_host(*, num_slots: int) -> HostTier:
    """Host memory that is always cheaper than computing again."""
    host = HostTier(num_slots, copy_s_per_block=1e-6)
    host.observe(num_tokens=10, num_seqs=1, step_s=1.0)
    return host


def scheduler(
    *,
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    budget: int = 16,
    caching: bool = True,
    host: HostTier | None = None,
) -> IterationScheduler:
    return IterationScheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
        host=host,
    )


def step(of: IterationScheduler) -> dict[str, int]:
    """One step in which every sequence that is complete gets a token; what ran, by name."""
    schedule = of.schedule()
    of.copies_out.clear()
    of.copies_in.clear()
    of.complete(schedule)
    for seq in schedule:
        if seq.num_uncomputed == 0:
            seq.append(0)
    return {seq.request_id: num_tokens for seq, num_tokens in schedule.items()}
