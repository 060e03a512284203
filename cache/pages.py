"""The KV-cache's memory on one rank: pages of keys and values, addressed by block id.

One allocation, indexed (block, layer, key or value, head, slot in block, head_dim). Blocks stand
outermost, so that

- a block's keys and values of all layers are one piece of memory, to be moved or sent as it is;
- memory is committed as blocks are used: with layers or heads outside, the first token of all
  would touch a page (of 2 MiB, where the system has huge ones) in each of their regions;
- a rank with other heads holds the same blocks, just other rows of the head dimension;
- a narrower element type with one scale per (token, head) needs a plane with the same leading
  dimensions and nothing else: only `LayerPages.store` and `LayerPages.read` know the element type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PageShape:
    """How one rank's pages are laid out. `block_size` is in tokens."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Memory of one block over all layers, keys and values."""
        elements = 2 * self.num_layers * self.num_kv_heads * self.block_size * self.head_dim
        return elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's pages, out of all layers' memory.

    Blocks and heads (or slots and heads) are addressed as rows, which `KVPages.block_rows` and
    `KVPages.slot_rows` compute once for all layers of a step: copying whole rows is what torch
    does in parallel and at the memory's speed. `keys` and `values` (elements,) are the memory from
    where this layer's rows count 0; they overlap with other layers'.
    """

    keys: Tensor
    values: Tensor
    shape: PageShape

    def store(self, slot_rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write new tokens' keys and values (num_tokens, kv_heads, head_dim) to their slots.

        `slot_rows`: what `KVPages.slot_rows` made of the tokens' slots.
        """
        for memory, new in ((self.keys, keys), (self.values, values)):
            by_head = new.transpose(0, 1).reshape(len(slot_rows), -1)
            memory.view(-1, self.shape.head_dim).index_copy_(0, slot_rows, by_head)

    def read(self, block_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of blocks' keys and values, (kv_heads, num_blocks_read * block_size, head_dim).

        `block_rows`: what `KVPages.block_rows` made of the block ids. Slots that were never
        written hold zeros, those of freed blocks old values: finite ones, as what is not is wiped
        with its sequence's end, so masking their scores is enough.
        """
        return self._read(self.keys, block_rows), self._read(self.values, block_rows)

    def _read(self, memory: Tensor, block_rows: Tensor) -> Tensor:
        shape = self.shape
        by_row = memory.view(-1, shape.block_size * shape.head_dim)
        rows = by_row.index_select(0, block_rows)
        return rows.view(shape.num_kv_heads, -1, shape.head_dim)


class KVPages:
    """All layers' pages on one rank."""

    def __init__(self, shape: PageShape, num_blocks: int, device: torch.device) -> None:
        """Reserve the memory. On the CPU it is committed page by page as blocks are written."""
        self.shape = shape
        self.num_blocks = num_blocks
        self.data = zeros(
            (
                num_blocks,
                shape.num_layers,
                2,
                shape.num_kv_heads,
                shape.block_size,
                shape.head_dim,
            ),
            shape.dtype,
            device,
        )
        memory = self.data.view(-1)
        plane = shape.num_kv_heads * shape.block_size * shape.head_dim
        self._layers = [
            LayerPages(memory[2 * layer * plane :], memory[(2 * layer + 1) * plane :], shape)
            for layer in range(shape.num_layers)
        ]
        self._heads = torch.arange(shape.num_kv_heads, device=device)[:, None]
        self._rows_per_block = shape.num_layers * 2 * shape.num_kv_heads

    def layer(self, index: int) -> LayerPages:
        """The pages of layer `index`."""
        return self._layers[index]

    def wipe(self, block_ids: Tensor) -> None:
        """Fill these blocks, (n,) int64, with zeros in all layers."""
        self.data.index_fill_(0, block_ids, 0)

    def block_rows(self, block_ids: Tensor) -> Tensor:
        """Where blocks lie: (n,) block ids -> (kv_heads * n,) int64 rows, head by head."""
        return (block_ids.to(self._heads) * self._rows_per_block + self._heads).flatten()

    def slot_rows(self, slot_mapping: Tensor) -> Tensor:
        """Where slots lie: (n,) block_id * block_size + offset -> (kv_heads * n,) int64 rows."""
        slots, block_size = slot_mapping.to(self._heads), self.shape.block_size
        blocks = self.block_rows(slots // block_size).view(len(self._heads), -1)
        return (blocks * block_size + slots % block_size).flatten()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on the CPU, its memory is committed as it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed memory, which costs nothing until it is touched; torch.zeros
    # writes the zeros itself, and torch.empty may return old bytes that read as NaN.
    size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size_bytes, dtype=np.uint8)).view(dtype).view(shape)
