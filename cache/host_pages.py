"""Host memory for blocks whose sequences do not run, and the copies between it and the pages.

Slots of host memory are laid out like blocks of the pages, so a block goes there and back as the
one piece of memory that it is. On a GPU the memory is pinned, and copies run in the order of the
device's own work without anybody waiting for them. On the CPU it is a second part of the same
memory, committed as it is used.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cache.pages import KVPages, zeros

_NUM_TIMED_COPIES = 8


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

    def measure_copy_s(self) -> float:
        """The time that one block takes; to be called while the pages hold nothing of use."""
        if not self.num_slots:
            return 0.0
        num_copies = min(_NUM_TIMED_COPIES, self.num_slots, len(self._pages))
        copies = torch.arange(num_copies, dtype=torch.int32).repeat(2, 1).T
        self._copy_and_wait(copies)  # commits the memory
        started_s = time.perf_counter()
        self._copy_and_wait(copies)
        return (time.perf_counter() - started_s) / (2 * num_copies)

    def _copy_and_wait(self, copies: Tensor) -> None:
        self.copy_out(copies)
        self.copy_in(copies)
        if self._pages.device.type == "cuda":
            torch.cuda.synchronize(self._pages.device)
