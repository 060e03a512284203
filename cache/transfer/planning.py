"""Which rank is asked for which heads, and in which order their pieces come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache.transfer.failures import TransferFailed
from cache.transfer.messages import RankSource

RUN_BYTES = 1024 * 1024
"""A run has as many blocks as fit in, at least one: large enough that what an operation costs does
not count, small enough to stay in the cache between being received, checked and put in place."""


@dataclass(frozen=True, slots=True)
class Run:
    """The pieces of one head of `num_blocks` blocks that follow each other in the ticket."""

    head: int
    first_block: int
    num_blocks: int

    @property
    def blocks(self) -> slice:
        """Which of the ticket's blocks."""
        return slice(self.first_block, self.first_block + self.num_blocks)


def runs(num_blocks: int, heads: Sequence[int], piece_bytes: int) -> Iterator[Run]:
    """All pieces of these heads, in the order in which both sides go through them."""
    per_run = blocks_per_run(piece_bytes)
    for head in heads:
        for first_block in range(0, num_blocks, per_run):
            yield Run(head, first_block, min(per_run, num_blocks - first_block))


def blocks_per_run(piece_bytes: int) -> int:
    """The most blocks that a run has."""
    return max(1, RUN_BYTES // piece_bytes)


def divide_heads(wanted: range, sources: Sequence[RankSource], rank: int) -> dict[int, list[int]]:
    """For each exporting rank that is to be asked, the heads that it is asked for.

    A head that several ranks hold is taken from the one of which the fewest are wanted so far, and
    among those from the first at or after our own `rank`, so that importing ranks which want the
    same head turn to different copies. Heads that only one rank holds are given out first.

        exporter of 2:  0 1 | 1 2     importer of 3:  0 | 1 | 2    asks rank 0 | 1 | 1
        exporter of 3:  0 | 1 | 2     importer of 2:  0 1 | 1 2    asks 0 and 1 | 1 and 2

    Raises TransferFailed if nobody holds one of them.
    """
    holders = {
        head: [index for index, source in enumerate(sources) if head in source.heads]
        for head in wanted
    }
    chosen: dict[int, list[int]] = {}
    for head in sorted(wanted, key=lambda head: len(holders[head])):
        if not holders[head]:
            raise TransferFailed(f"no rank of the exporter holds key/value head {head}")
        best = min(
            holders[head],
            key=lambda index: (len(chosen.get(index, ())), (index - rank) % len(sources)),
        )
        chosen.setdefault(best, []).append(head)
    return chosen
