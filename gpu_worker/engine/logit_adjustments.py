"""What changes logits before a token is chosen: penalties, and stops that would come too early."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gpu_worker.engine.sequence import Sequence, TokenCounts


def mask_early_stops(logits: Tensor, sequence: Sequence) -> None:
    """Make it impossible to stop before `min_tokens`; `logits`: (vocab,), changed in place."""
    if sequence.num_generated < sequence.params.min_tokens and sequence.stop_token_ids:
        logits[list(sequence.stop_token_ids)] = -torch.inf


def apply_penalties(logits: Tensor, sequences: Mapping[int, Sequence]) -> None:
    """Change the logits of the tokens that each sequence has seen, all sequences in one go.

    `logits`: (rows, vocab) float32, changed in place; `sequences` by their rows. Repetition
    (arXiv 1909.05858) goes by prompt and output, frequency and presence (OpenAI) by output alone.
    """
    tables = [_token_counts(sequence) for sequence in sequences.values()]
    params = [sequence.params for sequence in sequences.values()]
    sizes = torch.tensor([len(table.token_ids) for table in tables])

    def spread(per_sequence: list[float]) -> Tensor:
        return torch.tensor(per_sequence).repeat_interleave(sizes).to(logits.device)

    def join(parts: list[np.ndarray[tuple[int], np.dtype[np.uint32]]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(logits.device)

    rows = torch.tensor(list(sequences)).repeat_interleave(sizes).to(logits.device)
    tokens = join([np.array(table.token_ids) for table in tables])
    counts = join([np.array(table.counts) for table in tables])
    values = logits[rows, tokens]
    repetition = spread([p.repetition_penalty for p in params])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([p.frequency_penalty for p in params]) * counts
    values -= spread([p.presence_penalty for p in params]) * (counts > 0)
    logits[rows, tokens] = values


def _token_counts(sequence: Sequence) -> TokenCounts:
    assert sequence.token_counts is not None, "a sequence with penalties counts its tokens"
    return sequence.token_counts
