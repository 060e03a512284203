"""What one engine step computes: the seam between the iteration scheduler and the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_NUM_SIZES = 7
NO_BLOCKS = torch.empty(0, dtype=torch.int32)
NO_COPIES = torch.empty((0, 2), dtype=torch.int32)


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
        copies_out    [[5, 0]]                 blocks and the slots of host memory that they go to
        wiped_blocks  []                       to be filled with zeros
        copies_in     [[9, 4]]                 blocks and the slots of host memory that they get

    The last three happen before the step, copies out first; no block is both wiped and copied in.
    A plan may have copies out alone, and no tokens.

    Shapes: token_ids, positions, slot_mapping (num_tokens,); query_starts (num_seqs + 1,);
    context_lens (num_seqs,); block_tables (num_seqs, max_num_blocks); logits_rows (num_samples,);
    wiped_blocks (num_wiped,); copies_out, copies_in (num_copies, 2).
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    copies_out: Tensor = field(default_factory=lambda: NO_COPIES)
    wiped_blocks: Tensor = field(default_factory=lambda: NO_BLOCKS)
    copies_in: Tensor = field(default_factory=lambda: NO_COPIES)

    @property
    def num_tokens(self) -> int:
        """Rows of the flattened step."""
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        """Sequences that take part in the step."""
        return self.context_lens.shape[0]

    def pack(self) -> Tensor:
        """The whole plan as one (n,) int32 tensor: seven sizes, then the tensors end to end."""
        sizes = (
            self.num_tokens,
            self.num_seqs,
            self.block_tables.shape[1],
            self.logits_rows.shape[0],
            self.copies_out.shape[0],
            self.wiped_blocks.shape[0],
            self.copies_in.shape[0],
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
                self.copies_out.flatten(),
                self.wiped_blocks,
                self.copies_in.flatten(),
            )
        )

    @staticmethod
    def unpack(packed: Tensor) -> StepPlan:
        """The inverse of `pack`. The plan's tensors are views of `packed`."""
        num_tokens, num_seqs, max_num_blocks, num_samples, num_out, num_wiped, num_in = packed[
            :_NUM_SIZES
        ].tolist()
        parts = torch.split(
            packed[_NUM_SIZES:],
            [
                num_tokens,
                num_tokens,
                num_tokens,
                num_seqs + 1,
                num_seqs,
                num_seqs * max_num_blocks,
                num_samples,
                2 * num_out,
                num_wiped,
                2 * num_in,
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
            copies_out=parts[7].view(-1, 2),
            wiped_blocks=parts[8],
            copies_in=parts[9].view(-1, 2),
        )
