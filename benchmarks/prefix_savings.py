"""How many prompt tokens the prefix cache saves, beside what an oracle with the same memory saves.

    python -m benchmarks.prefix_savings --trace conversation_trace.jsonl

Requests are replayed through the engine's own policies (`benchmarks.prefix_replay`); nothing is
timed, so every run gives the same figures. With one group:

    saved       by the cache as it is, which knows the requests that wait in the group, and which
                contents were found before
    plain       by one that knows neither: least recently used first
    oracle      by one that knows all requests to come, and evicts what is used again last; under
                the same scheduler, with the same memory (`benchmarks.prefix_oracle`)
    unlimited   by any cache that has room for everything

With four, requests are routed by the scheduler's planner, which also says what to fetch from
another group; a quarter of each group's memory is the host's. The oracle either routes each request
to the group that has or awaits most of its prompt ("routed"), or has the memory of all four in one
("pooled").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from benchmarks.prefix_oracle import Future, OracleCache, PlainCache
from benchmarks.prefix_replay import (
    Limits,
    ReplayedGroup,
    chains,
    replay_one,
    replay_planned,
    replay_routed,
    usable,
)
from benchmarks.prefix_workloads import (
    BLOCK_SIZE,
    Workload,
    conversation_trace,
    shared_prefixes,
)
from benchmarks.tables import print_table, say
from cache.tiers import TieredCache
from wire.ids import BlockHash

NUM_GROUPS = 4
READ_AHEAD = 4096
"""Requests that the scheduler reads ahead of the groups' credits, by default."""

_SHARES = ("saved/oracle", "plain/oracle")
_ONE_GROUP = ("one group: blocks", "on the host", "saved", "plain", "oracle", "unlimited", *_SHARES)
_FOUR_SHARES = ("saved/routed", "saved/pooled")
_FOUR_GROUPS = ("four groups: blocks each", "saved", "routed", "pooled", "unlimited", *_FOUR_SHARES)


@dataclass(frozen=True, slots=True)
class OneGroup:
    """Prompt tokens saved with `num_blocks` in all, of which `num_slots` in host memory."""

    workload: str
    num_blocks: int
    num_slots: int
    saved: int
    plain: int
    oracle: int
    unlimited: int


@dataclass(frozen=True, slots=True)
class FourGroups:
    """Prompt tokens saved with `num_blocks` in each group."""

    workload: str
    num_blocks: int
    saved: int
    routed: int
    pooled: int
    unlimited: int


class Replays:
    """One workload, through caches of many sizes."""

    def __init__(self, workload: Workload, limits: Limits) -> None:
        self.workload = workload
        self._limits = limits
        self._chains = chains(workload)
        self._usable = usable(workload, self._chains)
        self._unlimited = _first_time_savings(self._chains, self._usable)

    def one_group(self, num_blocks: int, num_slots: int) -> OneGroup:
        """With `num_slots` of the blocks in host memory."""
        on_device, limits = num_blocks - num_slots, self._limits

        def replay(cache: TieredCache, future: Future | None = None) -> int:
            return replay_one(self.workload, ReplayedGroup(cache, limits, future), limits)

        future = Future(self._usable)
        return OneGroup(
            self.workload.name,
            num_blocks,
            num_slots,
            saved=replay(TieredCache(on_device, BLOCK_SIZE, num_slots)),
            plain=replay(PlainCache(on_device, BLOCK_SIZE, num_slots)),
            oracle=replay(OracleCache(on_device, BLOCK_SIZE, num_slots, future), future),
            unlimited=self._unlimited,
        )

    def four_groups(self, num_blocks: int) -> FourGroups:
        """With `num_blocks` each, a quarter of them in host memory, where blocks are fetched to."""
        limits, num_slots = self._limits, num_blocks // 4
        caches = [
            TieredCache(num_blocks - num_slots, BLOCK_SIZE, num_slots) for _ in range(NUM_GROUPS)
        ]
        planned = [ReplayedGroup(cache, limits) for cache in caches]
        pooled_limits = Limits(*(NUM_GROUPS * limit for limit in asdict(limits).values()))
        future = Future(self._usable)
        pooled = ReplayedGroup(
            OracleCache(NUM_GROUPS * num_blocks, BLOCK_SIZE, 0, future), pooled_limits, future
        )
        return FourGroups(
            self.workload.name,
            num_blocks,
            saved=replay_planned(self.workload, self._chains, planned, limits, READ_AHEAD),
            routed=self._routed(num_blocks),
            pooled=replay_one(self.workload, pooled, pooled_limits),
            unlimited=self._unlimited,
        )

    def _routed(self, num_blocks: int) -> int:
        future = Future(self._usable)
        caches = [OracleCache(num_blocks, BLOCK_SIZE, 0, future) for _ in range(NUM_GROUPS)]
        groups = [ReplayedGroup(cache, self._limits, future) for cache in caches]

        def route(number: int, room: Sequence[int]) -> int:
            def key(i: int) -> tuple[int, int]:
                has = takewhile(caches[i].has_or_awaits, self._usable[number])
                return -sum(1 for _ in has), groups[i].num_owned

            return min(room, key=key)

        return replay_routed(self.workload, groups, self._limits, route)


def _first_time_savings(
    hashes: Sequence[Sequence[BlockHash]], reusable: Sequence[Sequence[BlockHash]]
) -> int:
    """Tokens of blocks that an earlier request had too."""
    seen: set[BlockHash] = set()
    num_blocks = 0
    for chain, usable_part in zip(hashes, reusable, strict=True):
        num_blocks += sum(block_hash in seen for block_hash in usable_part)
        seen.update(chain)
    return num_blocks * BLOCK_SIZE


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = _parse(argv)
    work = [(shared_prefixes(), Limits(128, 1024, 256), [1500, 2000, 3000, 4500], [1500, 3000])]
    if arguments.trace is not None:
        trace = conversation_trace(arguments.trace, arguments.limit)
        # A step's budget is 8,192 tokens at the trace's scale.
        sizes = [2000, 5000, 10_000, 20_000, 50_000, 100_000]
        limits = Limits(128, 8192 // trace.scale, 256)
        work.append((trace, limits, sizes, [2000, 5000, 12_500, 25_000]))
    ones: list[OneGroup] = []
    fours: list[FourGroups] = []
    for workload, limits, sizes, sizes_of_four in work:
        replays = Replays(workload, limits)
        say(f"{workload.name}: {len(workload.asks)} requests")
        _print_title(workload)
        for size in sizes:
            ones.append(replays.one_group(size, 0))
            say(f"one group of {size} blocks")
        ones.append(replays.one_group(sizes[-2], sizes[-2] // 2))
        _print_one_group(workload, ones)
        for size in sizes_of_four:
            fours.append(replays.four_groups(size))
            say(f"four groups of {size} blocks")
        _print_four_groups(workload, fours)
    print(
        json.dumps({"one_group": list(map(asdict, ones)), "four_groups": list(map(asdict, fours))})
    )


def _print_title(workload: Workload) -> None:
    print(
        f"\n{workload.name}: {len(workload.asks)} requests, "
        f"{workload.num_prompt_tokens * workload.scale:,} prompt tokens, "
        f"blocks of {BLOCK_SIZE * workload.scale}"
    )


def _print_one_group(workload: Workload, figures: Sequence[OneGroup]) -> None:
    total = workload.num_prompt_tokens
    print_table(
        _ONE_GROUP,
        [
            [
                f"{row.num_blocks:,}",
                f"{row.num_slots:,}",
                *(
                    f"{tokens / total:.2%}"
                    for tokens in (row.saved, row.plain, row.oracle, row.unlimited)
                ),
                _share(row.saved, row.oracle),
                _share(row.plain, row.oracle),
            ]
            for row in figures
            if row.workload == workload.name
        ],
    )


def _print_four_groups(workload: Workload, figures: Sequence[FourGroups]) -> None:
    total = workload.num_prompt_tokens
    print_table(
        _FOUR_GROUPS,
        [
            [
                f"{row.num_blocks:,}",
                *(
                    f"{tokens / total:.2%}"
                    for tokens in (row.saved, row.routed, row.pooled, row.unlimited)
                ),
                _share(row.saved, row.routed),
                _share(row.saved, row.pooled),
            ]
            for row in figures
            if row.workload == workload.name
        ],
    )


def _share(saved: int, possible: int) -> str:
    return f"{saved / possible:.1%}" if possible else "-"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.prefix_savings", description="Prompt tokens that the prefix cache saves."
    )
    parser.add_argument("--trace", type=Path, help="a trace of conversations, in Mooncake's format")
    parser.add_argument("--limit", type=int, help="so many requests of the trace only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
