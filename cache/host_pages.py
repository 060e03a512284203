"""Host memory for blocks that the pages have no room for, and the copies between the two.

Slots of host memory are laid out like blocks of the pages, so a block goes there and back as the
one piece of memory that it is. On a GPU the memory is pinned, and copies run in the order of the
device's own work without anybody waiting for them. On the CPU it is a second part of the same
memory, committed as it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cache.pages import KVPages, zeros


class HostPages:
    """One rank's host memory for `num_slots` blocks."""

    def __init__(self, pages: KVPages, num_slots: int) -> None:
        self.num_slots = num_slots
        self._pages = pages.data
        shape, dtype = (num_slots, *pages.data.shape[1:]), pages.data.dtype
        if pages.data.device.type == "cpu" and num_slots:
            self._slots = zeros(shape, dtype, pages.data.device)
        else:
            is_pinned = pages.data.device.type == "cuda"
            self._slots = torch.zeros(shape, dtype=dtype, pin_memory=is_pinned)

    def copy_out(self, copies: Tensor) -> None:
        """Copy blocks to host memory; `copies`: (n, 2) int32, a block and its slot each."""
        for block_id, slot in copies.tolist():
            self._slots[slot].copy_(self._pages[block_id], non_blocking=True)

    def copy_in(self, copies: Tensor) -> None:
        """Copy blocks back; `copies`: (n, 2) int32, a block and its slot each."""
        for block_id, slot in copies.tolist():
            self._pages[block_id].copy_(self._slots[slot], non_blocking=True)
