"""Pages of any format with numbers in them."""

from __future__ import annotations

import torch
from torch import Tensor

from cache.pages import KVPages


def fill_pages(pages: KVPages, generator: torch.Generator | None = None) -> None:
    """Write normally distributed keys and values to all slots of all layers."""
    shape = pages.shape
    slots = torch.arange(pages.num_blocks * shape.block_size)
    rows = (len(slots), shape.num_kv_heads, shape.head_dim)
    for layer in range(shape.num_layers):
        keys, values = (torch.randn(rows, generator=generator) for _ in range(2))
        pages.layer(layer).store(pages.slot_rows(slots), keys, values)


def write_slots(pages: KVPages, slots: Tensor, number: float) -> None:
    """Write `number` everywhere in `slots` (block_id * block_size + offset) of all layers."""
    shape = pages.shape
    rows = torch.full((len(slots), shape.num_kv_heads, shape.head_dim), number)
    for layer in range(shape.num_layers):
        pages.layer(layer).store(pages.slot_rows(slots), rows, rows)


def write_blocks(pages: KVPages, block_ids: Tensor, number: float) -> None:
    """Write `number` everywhere in blocks (n,) int64."""
    offsets = torch.arange(pages.shape.block_size)
    write_slots(pages, (block_ids[:, None] * pages.shape.block_size + offsets).flatten(), number)
