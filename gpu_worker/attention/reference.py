"""Paged attention by the book: one query head of one sequence at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from cache.pages import KVPages, LayerPages
from gpu_worker.attention.interface import HeadMap
from gpu_worker.step_plan import StepPlan


class ReferenceAttention:
    """The truth that other implementations are tested against; slow, on any device."""

    def __init__(self, plan: StepPlan, pages: KVPages) -> None:
        """Keep the plan of the step."""
        self._plan = plan
        self._pages = pages

    def __call__(self, query: Tensor, pages: LayerPages, heads: HeadMap, scale: float) -> Tensor:
        """See `PagedAttention`."""
        output = torch.empty_like(query)
        starts = self._plan.query_starts.tolist()
        for seq, context_len in enumerate(self._plan.context_lens.tolist()):
            rows = slice(starts[seq], starts[seq + 1])
            num_new = rows.stop - rows.start
            num_blocks = -(-context_len // self._pages.shape.block_size)
            block_ids = self._plan.block_tables[seq, :num_blocks]
            keys, values = pages.read(self._pages.block_rows(block_ids), torch.float32)
            # Row i of the new tokens sees everything up to and including its own position.
            visible = torch.ones(num_new, context_len, dtype=torch.bool, device=query.device)
            visible = visible.tril(context_len - num_new)
            for head, kv_head in enumerate(heads.kv_head_of_query):
                key = keys[kv_head, :context_len]
                value = values[kv_head, :context_len]
                scores = query[rows, head].float() @ key.T * scale
                weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
                output[rows, head] = (weights @ value).to(query.dtype)
        return output
