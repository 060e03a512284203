"""What one engine step computes: the seam between the iteration scheduler and the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step over all scheduled sequences, flattened: no padding between sequences.

    All tensors are int32 on the CPU. With two sequences, a decode at position 7 and a prefill
    chunk of the first 3 tokens of another, in blocks of 4 tokens:

        token_ids     [ 17,    5,  6,  8]
        positions     [  7,    0,  1,  2]
        slot_mapping  [ 39,   12, 13, 14]      block_id * block_size + offset
        query_starts  [  0,    1,          4]  first row of each sequence, then num_tokens
        context_lens  [  8,    3]              tokens in the cache after this step
        block_tables  [[2, 9], [3, 0]]         padded with 0
        logits_rows   [  0]                    the prefill is not finished, so it samples nothing
        wiped_blocks  []                       to be filled with zeros before the step

    Shapes: token_ids, positions, slot_mapping (num_tokens,); query_starts (num_seqs + 1,);
    context_lens (num_seqs,); block_tables (num_seqs, max_num_blocks); logits_rows (num_samples,);
    wiped_blocks (num_wiped,).
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    wiped_blocks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    @property
    def num_tokens(self) -> int:
        """Rows of the flattened step."""
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        """Sequences that take part in the step."""
        return self.context_lens.shape[0]

    def pack(self) -> Tensor:
        """The whole plan as one (n,) int32 tensor: five sizes, then the tensors end to end."""
        sizes = (
            self.num_tokens,
            self.num_seqs,
            self.block_tables.shape[1],
            self.logits_rows.shape[0],
            self.wiped_blocks.shape[0],
        )
        return torch.cat(
            (
                torch.tensor(sizes, dtype=torch.int32),
                self.token_ids,
                self.positions,
                self.slot_mapping,
                self.query_starts,
                self.context_lens,
                self.block_tables.flatten(),
                self.logits_rows,
                self.wiped_blocks,
            )
        )

    @staticmethod
    def unpack(packed: Tensor) -> StepPlan:
        """The inverse of `pack`. The plan's tensors are views of `packed`."""
        num_tokens, num_seqs, max_num_blocks, num_samples, num_wiped = packed[:5].tolist()
        parts = torch.split(
            packed[5:],
            [
                num_tokens,
                num_tokens,
                num_tokens,
                num_seqs + 1,
                num_seqs,
                num_seqs * max_num_blocks,
                num_samples,
                num_wiped,
            ],
        )
        return StepPlan(
            token_ids=parts[0],
            positions=parts[1],
            slot_mapping=parts[2],
            query_starts=parts[3],
            context_lens=parts[4],
            block_tables=parts[5].view(num_seqs, max_num_blocks),
            logits_rows=parts[6],
            wiped_blocks=parts[7],
        )
