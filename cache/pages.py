"""The KV-cache's memory on one rank: pages of keys and values, addressed by block id.

One allocation of bytes, (num_blocks, bytes_per_block). Within a block:

    elements    (layer, key or value, head, slot, head_dim) in the format's type
    scales      (layer, key or value, head, slot) in bfloat16, if the format has them
    padding     to whole planes (slot, head_dim) of elements, so that planes lie evenly throughout

Blocks stand outermost, so that

- a block's keys and values of all layers are one piece of memory, to be moved or sent as it is;
- memory is committed as blocks are used: with layers or heads outside, the first token of all
  would touch a page (of 2 MiB, where the system has huge ones) in each of their regions;
- a rank with other heads holds the same blocks, just other rows of the head dimension.

Only `LayerPages.store` and `LayerPages.read`, and our kernels (`gpu_worker/kernels`), know the
format (`cache/page_formats.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache.page_formats import SCALE_DTYPE, PageFormat


@dataclass(frozen=True, slots=True)
class PageShape:
    """How one rank's pages are laid out. `block_size` is in tokens."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    format: PageFormat

    @property
    def num_planes(self) -> int:
        """Planes of a block: (slot, head_dim), one for each layer, key or value, and head."""
        return 2 * self.num_layers * self.num_kv_heads

    @property
    def plane_bytes(self) -> int:
        """Memory of a plane's elements."""
        return self.block_size * self.head_dim * self.format.dtype.itemsize

    @property
    def scales_offset(self) -> int:
        """Bytes from a block's start to its scales: all elements lie before."""
        return self.num_planes * self.plane_bytes

    @property
    def bytes_per_block(self) -> int:
        """Memory of one block over all layers: keys, values, scales and padding."""
        num_bytes = self.scales_offset
        if self.format.has_scales:
            num_bytes += self.num_planes * self.block_size * SCALE_DTYPE.itemsize
        return -(-num_bytes // self.plane_bytes) * self.plane_bytes


@dataclass(frozen=True, slots=True)
class PageRows:
    """Where things lie in one layer's pages: rows of its elements and, with scales, of those.

    They are computed once for all layers of a step: copying whole rows is what torch does in
    parallel and at the memory's speed.
    """

    elements: Tensor
    scales: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's pages, out of all layers' memory.

    `keys` and `values` (elements,), and `key_scales` and `value_scales` (bfloat16,) if the format
    has them, are the memory from where this layer's rows count 0; they overlap with other layers'.
    `addresses` is where the four begin, for kernels that are called for every layer of a step.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    shape: PageShape
    addresses: tuple[int | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Look up the addresses."""
        memories = (self.keys, self.values, self.key_scales, self.value_scales)
        addresses = tuple(None if m is None else m.data_ptr() for m in memories)
        object.__setattr__(self, "addresses", addresses)

    def store(self, slot_rows: PageRows, keys: Tensor, values: Tensor) -> None:
        """Write new tokens' keys and values (num_tokens, kv_heads, head_dim) to their slots.

        `slot_rows`: what `KVPages.slot_rows` made of the tokens' slots.
        """
        self._store(self.keys, self.key_scales, slot_rows, keys)
        self._store(self.values, self.value_scales, slot_rows, values)

    def read(self, block_rows: PageRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of blocks' keys and values, (kv_heads, num_blocks_read * block_size, head_dim).

        `block_rows`: what `KVPages.block_rows` made of the block ids. Slots that were never
        written hold zeros, those of freed blocks old values: finite ones, as what is not is wiped
        with its sequence's end, so masking their scores is enough.
        """
        keys = self._read(self.keys, self.key_scales, block_rows, dtype)
        return keys, self._read(self.values, self.value_scales, block_rows, dtype)

    def _store(
        self, memory: Tensor, scale_memory: Tensor | None, rows: PageRows, new: Tensor
    ) -> None:
        by_head = new.transpose(0, 1).reshape(len(rows.elements), -1)
        elements, scales = self.shape.format.narrow(by_head)
        _copyable(memory.view(-1, self.shape.head_dim)).index_copy_(
            0, rows.elements, _copyable(elements)
        )
        if scale_memory is not None:
            assert scales is not None
            assert rows.scales is not None
            scale_memory.index_copy_(0, rows.scales, scales)

    def _read(
        self, memory: Tensor, scale_memory: Tensor | None, rows: PageRows, dtype: torch.dtype
    ) -> Tensor:
        shape = self.shape
        planes = memory.view(-1, shape.block_size * shape.head_dim)
        elements = _copyable(planes).index_select(0, rows.elements).view(memory.dtype)
        elements = elements.view(shape.num_kv_heads, -1, shape.head_dim)
        scales = None
        if scale_memory is not None:
            assert rows.scales is not None
            scales = scale_memory.view(-1, shape.block_size).index_select(0, rows.scales)
            scales = scales.view(shape.num_kv_heads, -1)
        return shape.format.widen(elements, scales, dtype)


class KVPages:
    """All layers' pages on one rank."""

    def __init__(self, shape: PageShape, num_blocks: int, device: torch.device) -> None:
        """Reserve the memory. On the CPU it is committed page by page as blocks are written."""
        self.shape = shape
        self.num_blocks = num_blocks
        self.data = zeros((num_blocks, shape.bytes_per_block), torch.uint8, device)
        self._elements = self.data.view(-1).view(shape.format.dtype)
        self._scales = self.data.view(-1).view(SCALE_DTYPE)
        self._layers = [self._layer(index) for index in range(shape.num_layers)]
        self._heads = torch.arange(shape.num_kv_heads, device=device)[:, None]

    def layer(self, index: int) -> LayerPages:
        """The pages of layer `index`."""
        return self._layers[index]

    def wipe(self, block_ids: Tensor) -> None:
        """Fill these blocks, (n,) int64, with zeros in all layers."""
        self.data.index_fill_(0, block_ids, 0)

    def block_rows(self, block_ids: Tensor) -> PageRows:
        """Where blocks lie: rows for (n,) block ids, (kv_heads * n,) int64 each, head by head."""
        elements, scales = self._block_rows(block_ids.to(self._heads))
        return PageRows(elements.flatten(), None if scales is None else scales.flatten())

    def slot_rows(self, slot_mapping: Tensor) -> PageRows:
        """Where slots lie: rows for (n,) block_id * block_size + offset, as `block_rows`."""
        slots, block_size = slot_mapping.to(self._heads), self.shape.block_size
        elements, scales = self._block_rows(slots // block_size)
        offsets = slots % block_size
        if scales is not None:
            scales = (scales * block_size + offsets).flatten()
        return PageRows((elements * block_size + offsets).flatten(), scales)

    def _block_rows(self, block_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = self.shape
        elements = block_ids * (shape.bytes_per_block // shape.plane_bytes) + self._heads
        if not shape.format.has_scales:
            return elements, None
        row_bytes = shape.block_size * SCALE_DTYPE.itemsize
        return elements, block_ids * (shape.bytes_per_block // row_bytes) + self._heads

    def _layer(self, index: int) -> LayerPages:
        shape = self.shape
        plane = shape.block_size * shape.head_dim
        # In planes from the block's start: this layer's keys, then its values.
        keys, values = 2 * index * shape.num_kv_heads, (2 * index + 1) * shape.num_kv_heads
        key_scales = value_scales = None
        if shape.format.has_scales:
            scales = self._scales[shape.scales_offset // SCALE_DTYPE.itemsize :]
            key_scales = scales[keys * shape.block_size :]
            value_scales = scales[values * shape.block_size :]
        return LayerPages(
            self._elements[keys * plane :],
            self._elements[values * plane :],
            key_scales,
            value_scales,
            shape,
        )


def _copyable(elements: Tensor) -> Tensor:
    """The same bytes in a type whose rows torch copies: it does not those of 8-bit floats."""
    return elements.view(torch.uint8) if elements.dtype.itemsize == 1 else elements


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on the CPU, its memory is committed as it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed memory, which costs nothing until it is touched; torch.zeros
    # writes the zeros itself, and torch.empty may return old bytes that read as NaN.
    size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size_bytes, dtype=np.uint8)).view(dtype).view(shape)
