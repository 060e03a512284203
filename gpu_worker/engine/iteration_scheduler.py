"""Which sequences take part in the next step, and with how many tokens each.

Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024):

    1. every sequence that is generating gets its one token, oldest first should the token budget
       not do for all: a long prompt never stalls it
    2. what is left of the budget goes to prompts that are partly computed, oldest first
    3. then to waiting sequences, first come, first served, while rows and blocks last

A sequence is admitted when blocks for all its tokens are free, and gets them at once: chunks of
its prompt can then not run dry half way. Later it grows block by block. When none is free, the
youngest running sequence is preempted: it gives up its blocks, goes back to the head of the queue,
and what it had generated is prefilled together with its prompt when its turn comes again. The
oldest sequence is thus never preempted for another, and every sequence becomes the oldest in time.

Pure policy: it sees counts and block ids, no tensor and no clock.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TypeAlias

from cache.block_pool import BlockPool
from gpu_worker.engine.sequence import Sequence

Schedule: TypeAlias = dict[Sequence, int]
"""How many tokens of which sequence the next step computes, in the order of its rows."""

_WATERMARK_SHARE = 0.01


class IterationScheduler:
    """Owns the queue, the running sequences and their blocks.

    A sequence must fit the pool by itself: the engine refuses prompts that do not, and ends
    sequences before they outgrow it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # both in order of arrival, all of running first
        self.num_preemptions = 0
        self.num_prefill_tokens = 0  # to compute at admission, summed up; cached ones apart
        self.num_cached_tokens = 0
        self._free_rows = list(range(max_num_seqs))
        self._max_num_batched_tokens = max_num_batched_tokens
        self._prefix_caching = prefix_caching
        # Admission leaves some blocks to those that run, or they would preempt the newcomer soon.
        self._watermark = int(pool.num_blocks * _WATERMARK_SHARE)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or no longer wanted, and free what it holds."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
            self.running.remove(sequence)

    def discard(self, sequence: Sequence) -> list[int]:
        """Remove a running sequence whose keys and values are no good, and let nobody reuse them.

        Returns the blocks that nobody holds any more, to be wiped before they are read again.
        """
        block_ids = sequence.block_table
        self.pool.forget(block_ids)
        self.remove(sequence)
        return [block_id for block_id in block_ids if self.pool.num_free_among((block_id,))]

    def schedule(self) -> Schedule:
        """Decide on the next step; empty when there is nothing to compute."""
        schedule: Schedule = {}
        budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        decodes = [s for s in self.running if s.num_uncomputed == 1]
        prefills = [s for s in self.running if s.num_uncomputed > 1]
        for sequence in (*decodes, *prefills):
            if not budget:
                break
            # The youngest may be this one itself, or one that is in the schedule already.
            while sequence.row is not None and not self._grow(sequence):
                budget += schedule.pop(self._preempt_youngest(), 0)
            if sequence.row is not None:
                schedule[sequence] = min(sequence.num_uncomputed, budget)
                budget -= schedule[sequence]
        if num_preemptions == self.num_preemptions:
            while budget and self.waiting and self._admit(self.waiting[0]):
                sequence = self.waiting.popleft()
                self.running.append(sequence)
                schedule[sequence] = min(sequence.num_uncomputed, budget)
                budget -= schedule[sequence]
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """Note that the step was executed: what it filled can be reused from now on."""
        block_size = self.pool.block_size
        for sequence, num_tokens in schedule.items():
            first_open = sequence.num_computed // block_size
            sequence.num_computed += num_tokens
            if self._prefix_caching and sequence.num_computed // block_size > first_open:
                self._register_blocks(sequence, first_open)

    def _grow(self, sequence: Sequence) -> bool:
        """Get the block that a running sequence's newest token needs, if it needs one."""
        num_blocks = self.pool.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if num_blocks <= 0:
            return True
        block_ids = self.pool.allocate(num_blocks)
        if block_ids is None:
            return False
        sequence.block_table.extend(block_ids)
        sequence.block_table_changed = True
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row, its prefix's cached blocks, and the blocks it lacks."""
        pool = self.pool
        prefix: list[int] = []
        if not self._free_rows:
            return False
        if self._prefix_caching:
            sequence.hash_full_blocks(pool.block_size)
            # The last token is always computed: the next one is drawn from its logits.
            num_reusable = (sequence.num_tokens - 1) // pool.block_size
            prefix = pool.find_prefix(sequence.block_hashes[:num_reusable])
        num_new = pool.num_blocks_for(sequence.num_tokens) - len(prefix)
        watermark = self._watermark if self.running else 0
        if num_new + pool.num_free_among(prefix) + watermark > pool.num_free:
            return False
        pool.touch(prefix)
        block_ids = pool.allocate(num_new)
        assert block_ids is not None, "free blocks were counted above"
        sequence.block_table = array("i", prefix + block_ids)
        sequence.block_table_changed = True
        sequence.num_computed = len(prefix) * pool.block_size
        self.num_cached_tokens += sequence.num_computed
        self.num_prefill_tokens += sequence.num_uncomputed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        sequence.row = self._free_rows.pop()
        return True

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.pool.free(sequence.block_table)
        self._free_rows.append(sequence.row)
        sequence.block_table = array("i")
        sequence.num_computed = 0
        sequence.row = None

    def _register_blocks(self, sequence: Sequence, first: int) -> None:
        """Make the blocks from index `first` on that are full by now findable by their contents."""
        pool, table = self.pool, sequence.block_table
        sequence.hash_full_blocks(pool.block_size)
        for i in range(first, sequence.num_computed // pool.block_size):
            parent = table[i - 1] if i else None
            block_id = pool.register(table[i], sequence.block_hashes[i], parent)
            if block_id != table[i]:
                table[i] = block_id
                sequence.block_table_changed = True
