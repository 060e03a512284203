"""Which sequences take part in the next step, and with how many tokens each.

Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024):

    1. every sequence that is generating gets its one token, oldest first should the token budget
       not do for all: a long prompt never stalls it
    2. what is left of the budget goes to prompts that are partly computed, oldest first
    3. then to waiting sequences, first come, first served, while rows and blocks last

A waiting sequence is held back, and those behind it go first, if a block that it could use is about
to be computed for another one: a prefix is computed once, however many its readers are, also when
they all come together. It is held for one step only. Something is left of the budget for those who
wait only in a step that completes all prompts that have been started, so what they have in common
with others is there afterwards. If the other one fails, the next one computes the prefix.

A sequence is admitted when blocks for all its tokens are free, and one more for each that runs. It
gets them at once: chunks of its prompt can then not run dry half way. Later it grows block by
block. When none is free, the youngest running sequence is preempted: it gives up its blocks and
goes back to its place in the queue. When its turn comes again, it finds its full blocks where other
prefixes are found, on the device or in host memory (`cache.tiers`), and what is missing is computed
again, generated tokens with the prompt's. The oldest running sequence is thus never preempted for
another, and every sequence becomes the oldest in time.

Pure policy: it sees counts and block ids, no tensor and no clock.
"""

from __future__ import annotations

from array import array
from bisect import insort
from operator import attrgetter
from typing import TypeAlias

from cache.tiers import FoundPrefix, TieredCache
from gpu_worker.engine.sequence import Sequence
from wire.ids import BlockHash

Schedule: TypeAlias = dict[Sequence, int]
"""How many tokens of which sequence the next step computes, in the order of its rows."""

_by_index = attrgetter("index")


class IterationScheduler:
    """Owns the queue, the running sequences and their blocks.

    A sequence must fit the pool by itself: the engine refuses prompts that do not, and ends
    sequences before they outgrow it.
    """

    def __init__(
        self,
        cache: TieredCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self.cache = cache
        self.waiting: list[Sequence] = []  # this and running in order of arrival
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefill_tokens = 0  # to compute at admission, summed up; cached ones apart
        self.num_cached_tokens = 0
        self._free_rows = list(range(max_num_seqs))
        self._max_num_batched_tokens = max_num_batched_tokens
        self._prefix_caching = prefix_caching

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)
        self._want(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or no longer wanted, and free what it holds."""
        if sequence.row is not None:
            self._release(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self.cache.unwant(self._reusable(sequence))

    def discard(self, sequence: Sequence) -> list[int]:
        """Remove a running sequence whose keys and values are no good, and let nobody reuse them.

        Returns the blocks that nobody holds any more, to be wiped before they are read again.
        """
        block_ids = sequence.block_table
        self.cache.forget(block_ids)
        self.remove(sequence)
        return [block_id for block_id in block_ids if not self.cache.device.is_held(block_id)]

    def schedule(self) -> Schedule:
        """Decide on the next step; empty when there is nothing to compute."""
        schedule: Schedule = {}
        num_preemptions = self.num_preemptions
        budget = self._continue_running(schedule)
        if num_preemptions == self.num_preemptions:
            self._admit_waiting(schedule, budget)
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """Note that the step was executed: what it filled can be reused from now on."""
        block_size = self.cache.block_size
        for sequence, num_tokens in schedule.items():
            first_open = sequence.num_computed // block_size
            sequence.num_computed += num_tokens
            if self._prefix_caching and sequence.num_computed // block_size > first_open:
                self._register_blocks(sequence, first_open)

    def _continue_running(self, schedule: Schedule) -> int:
        """Schedule what runs, as far as the budget goes; returns what is left of it."""
        budget, block_size = self._max_num_batched_tokens, self.cache.block_size
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            generates = len(sequence.token_ids) - sequence.num_computed == 1
            (decodes if generates else prefills).append(sequence)
        for sequence in (*decodes, *prefills):
            if not budget:
                break
            if len(sequence.token_ids) > len(sequence.block_table) * block_size:
                # The youngest may be this one itself, or one that is in the schedule already.
                while sequence.row is not None and not self._grow(sequence):
                    budget += schedule.pop(self._preempt_youngest(), 0)
            if sequence.row is not None:
                num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
                schedule[sequence] = num_tokens
                budget -= num_tokens
        return budget

    def _admit_waiting(self, schedule: Schedule, budget: int) -> None:
        if not (budget and self.waiting and self._free_rows):
            return
        computing: set[BlockHash] = set()
        for sequence in schedule:
            computing.update(self._uncomputed_blocks(sequence))
        num_held = 0
        while budget and self._free_rows and num_held < len(self.waiting):
            sequence = self.waiting[num_held]
            prefix, first_missing = self._find_prefix(sequence)
            if first_missing in computing:
                num_held += 1
                continue
            if not self._admit(sequence, prefix):
                break
            del self.waiting[num_held]
            insort(self.running, sequence, key=_by_index)
            schedule[sequence] = min(sequence.num_uncomputed, budget)
            budget -= schedule[sequence]
            computing.update(self._uncomputed_blocks(sequence))

    def _uncomputed_blocks(self, sequence: Sequence) -> list[BlockHash]:
        return sequence.block_hashes[sequence.num_computed // self.cache.block_size :]

    def _grow(self, sequence: Sequence) -> bool:
        """Get the block that a running sequence's newest token needs."""
        num_blocks = self.cache.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        block_ids = self.cache.grow(num_blocks)
        if block_ids is None:
            return False
        sequence.block_table.extend(block_ids)
        sequence.block_table_changed = True
        return True

    def _want(self, sequence: Sequence) -> None:
        if self._prefix_caching:
            sequence.hash_full_blocks(self.cache.block_size)
            self.cache.want(self._reusable(sequence))

    def _reusable(self, sequence: Sequence) -> list[BlockHash]:
        """What a waiting sequence can use if it is cached; none without prefix caching."""
        # The last token is always computed: the next one is drawn from its logits.
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self.cache.block_size]

    def _find_prefix(self, sequence: Sequence) -> tuple[FoundPrefix, BlockHash | None]:
        """What is cached of a waiting sequence's beginning, and the first block that it lacks."""
        reusable = self._reusable(sequence)
        prefix = self.cache.find_prefix(reusable)
        is_complete = prefix.num_blocks == len(reusable)
        return prefix, None if is_complete else reusable[prefix.num_blocks]

    def _admit(self, sequence: Sequence, prefix: FoundPrefix) -> bool:
        """Give a waiting sequence a row, its prefix's cached blocks, and the blocks it lacks."""
        cache, device = self.cache, self.cache.device
        num_blocks = cache.num_blocks_for(sequence.num_tokens)
        num_new = num_blocks - len(prefix.block_ids)
        # A block is left to each one that runs, or they would soon preempt the newcomer.
        num_left = device.num_free - num_new - device.num_free_among(prefix.block_ids)
        if num_left < len(self.running):
            return False
        sequence.block_table = array("i", cache.hold(prefix, num_blocks))
        cache.unwant(self._reusable(sequence))
        sequence.block_table_changed = True
        sequence.num_computed = prefix.num_blocks * cache.block_size
        sequence.row = self._free_rows.pop()
        self.num_cached_tokens += sequence.num_computed
        self.num_prefill_tokens += sequence.num_uncomputed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        return True

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self._release(sequence)
        insort(self.waiting, sequence, key=_by_index)
        self._want(sequence)
        self.num_preemptions += 1
        return sequence

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.cache.free(sequence.block_table)
        self._free_rows.append(sequence.row)
        sequence.block_table = array("i")
        sequence.num_computed = 0
        sequence.row = None

    def _register_blocks(self, sequence: Sequence, first: int) -> None:
        """Make the blocks from index `first` on that are full by now findable by their contents."""
        cache, table = self.cache, sequence.block_table
        sequence.hash_full_blocks(cache.block_size)
        for i in range(first, sequence.num_computed // cache.block_size):
            parent = table[i - 1] if i else None
            block_id = cache.register(table[i], sequence.block_hashes[i], parent)
            if block_id != table[i]:
                table[i] = block_id
                sequence.block_table_changed = True
