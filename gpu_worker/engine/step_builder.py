"""Lays a schedule out as the tensors of a step plan."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt
import torch

from cache.tiers import BlockCopy
from gpu_worker.engine.iteration_scheduler import Schedule
from gpu_worker.engine.sequence import Sequence
from gpu_worker.step_plan import NO_BLOCKS, NO_COPIES, StepPlan


class StepBuilder:
    """Holds the block tables of the running sequences, one row each, between steps.

    A sequence's row is copied anew only in the steps in which its block table changed; all other
    figures are computed for all sequences at once.
    """

    def __init__(self, *, max_num_seqs: int, max_blocks_per_seq: int, block_size: int) -> None:
        self._block_tables = np.zeros((max_num_seqs, max_blocks_per_seq), np.int32)
        self._block_size = block_size

    def build(
        self,
        schedule: Schedule,
        *,
        copies_out: list[BlockCopy],
        wiped_blocks: list[int],
        copies_in: list[BlockCopy],
    ) -> tuple[StepPlan, list[Sequence]]:
        """The plan, and the sequences that sample, in the order of its `logits_rows`."""
        block_size = self._block_size
        tokens, sampling = self._take_tokens(schedule)
        num_seqs = len(schedule)
        counts = np.fromiter(schedule.values(), np.int32, num_seqs)
        starts = np.array([sequence.num_computed for sequence in schedule], np.int32)
        rows = np.array([sequence.row for sequence in schedule], np.intp)
        samples = np.array([len(sequence.token_ids) for sequence in schedule], np.int32)
        query_starts = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        context_lens = starts + counts

        if len(tokens) == num_seqs:
            positions, table_rows = starts, rows
        else:
            # The position of flat row r of sequence s is starts[s] + r - query_starts[s].
            flat_rows = np.arange(len(tokens), dtype=np.int32)
            positions = np.repeat(starts - query_starts[:-1], counts) + flat_rows
            table_rows = np.repeat(rows, counts)
        blocks, offsets = np.divmod(positions, np.int32(block_size))
        slots = self._block_tables[table_rows, blocks] * np.int32(block_size) + offsets

        max_num_blocks = -(-int(context_lens.max()) // block_size)
        logits_rows = query_starts[1:][context_lens == samples] - 1
        plan = StepPlan(
            token_ids=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            query_starts=torch.from_numpy(query_starts),
            context_lens=torch.from_numpy(context_lens),
            block_tables=torch.from_numpy(self._block_tables[rows, :max_num_blocks]),
            logits_rows=torch.from_numpy(logits_rows),
            copies_out=_copies(copies_out),
            wiped_blocks=torch.tensor(wiped_blocks, dtype=torch.int32),
            copies_in=_copies(copies_in),
        )
        return plan, sampling

    def _take_tokens(self, schedule: Schedule) -> tuple[npt.NDArray[np.int32], list[Sequence]]:
        tokens = array("I")
        sampling: list[Sequence] = []
        for sequence, num_tokens in schedule.items():
            start = sequence.num_computed
            if num_tokens == 1:
                tokens.append(sequence.token_ids[start])
            else:
                tokens.extend(sequence.token_ids[start : start + num_tokens])
            if start + num_tokens == len(sequence.token_ids):
                sampling.append(sequence)
            if sequence.block_table_changed:
                self._copy_block_table(sequence)
        return np.frombuffer(tokens, np.uint32).astype(np.int32), sampling

    def _copy_block_table(self, sequence: Sequence) -> None:
        row = self._block_tables[sequence.row]
        num_blocks = len(sequence.block_table)
        row[:num_blocks] = np.frombuffer(sequence.block_table, np.int32)
        # What an earlier sequence left behind must not reach the plan: its padding is 0.
        row[num_blocks:] = 0
        sequence.block_table_changed = False


def first_step() -> StepPlan:
    """A step of one token, in a block that nobody holds yet, to set up what steps need."""
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return StepPlan(
        token_ids=zero,
        positions=zero,
        slot_mapping=zero,
        query_starts=torch.cat((zero, one)),
        context_lens=one,
        block_tables=zero.unsqueeze(0),
        logits_rows=zero,
    )


def copying_step(copies_out: list[BlockCopy]) -> StepPlan:
    """A step that computes nothing: blocks go to host memory while no sequence wants a step."""
    return StepPlan(
        token_ids=NO_BLOCKS,
        positions=NO_BLOCKS,
        slot_mapping=NO_BLOCKS,
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=NO_BLOCKS,
        block_tables=torch.empty((0, 0), dtype=torch.int32),
        logits_rows=NO_BLOCKS,
        copies_out=_copies(copies_out),
    )


def _copies(copies: list[BlockCopy]) -> torch.Tensor:
    return torch.tensor(copies, dtype=torch.int32) if copies else NO_COPIES
