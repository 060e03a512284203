"""The vocabulary at both ends of the model: token embedding and output head, sharded by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from gpu_worker.layers.operations import Product
from gpu_worker.tensor_parallel import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Each rank looks up the tokens it holds; the sum over ranks completes the rows.

    `weight`: (local tokens, hidden); local row 0 is token `first_token_id`. Rows come out as
    `activations`.
    """

    weight: Tensor
    first_token_id: int
    group: TensorParallelGroup
    activations: torch.dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(num_tokens,) int -> (num_tokens, hidden), the caller's to change."""
        if self.group.size == 1:
            return embedding(token_ids, self.weight).to(self.activations)
        local = token_ids - self.first_token_id
        elsewhere = (local < 0) | (local >= len(self.weight))
        rows = embedding(local.masked_fill(elsewhere, 0), self.weight).to(self.activations)
        return self.group.all_reduce(rows.masked_fill_(elsewhere[:, None], 0.0))


@dataclass(frozen=True, slots=True)
class VocabParallelHead:
    """Scores for the tokens that each rank holds, put together on rank 0.

    `product`: by (local tokens, hidden). `shard_lens` names every rank's number of tokens.
    """

    product: Product
    shard_lens: tuple[int, ...]
    group: TensorParallelGroup

    def __call__(self, values: Tensor) -> Tensor | None:
        """(num_samples, hidden) -> (num_samples, vocab_size) float32 on rank 0, None elsewhere."""
        logits = self.group.gather_columns(self.product(values), self.shard_lens)
        return None if logits is None else logits.float()
