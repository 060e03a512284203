"""Head pieces in the slots of a rank's host memory.

Within a block, as `cache.pages` lays it out:

    elements   (layer, keys or values, kv head, slot in block, head_dim)
    scales     (layer, keys or values, kv head, slot in block), in formats that have them
    padding    of any length

A head piece is one head's elements, then its scales. What travels are *runs*: pieces of one head
and several blocks, the elements of all of them, then the scales of all of them. That makes a run
two copies and one digest, however many blocks it has: beside a busy main thread each operation can
cost a wait for Python's global lock, so few large ones disturb least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The sizes of which blocks are made, without the number of heads.

    A *side* is one layer's keys or values. `element_bytes` and `scale_bytes` are one head's in one
    side: block_size * head_dim * bytes of an element, and block_size * bytes of a scale or 0.
    """

    num_sides: int
    element_bytes: int
    scale_bytes: int

    @property
    def piece_bytes(self) -> int:
        """Bytes of one head's part of a block."""
        return self.num_sides * (self.element_bytes + self.scale_bytes)


class HostSlots:
    """One rank's slots, seen as head pieces.

    `memory`: (num_slots, bytes of a block) uint8, shared with whoever copies blocks in and out.
    `heads` are the rank's key/value heads, counted in the whole model.
    """

    def __init__(self, memory: NDArray[np.uint8], layout: BlockLayout, heads: range) -> None:
        assert memory.dtype == np.uint8
        assert memory.shape[1] >= len(heads) * layout.piece_bytes
        self.layout = layout
        self.heads = heads
        self.num_slots = len(memory)
        num_sides, num_heads = layout.num_sides, len(heads)
        elements_end = num_sides * num_heads * layout.element_bytes
        scales_end = elements_end + num_sides * num_heads * layout.scale_bytes
        shape = (self.num_slots, num_sides, num_heads)
        # Splitting an axis never copies, whatever the strides.
        self._parts = [memory[:, :elements_end].reshape(*shape, layout.element_bytes)]
        if layout.scale_bytes:
            scales = memory[:, elements_end:scales_end]
            self._parts.append(scales.reshape(*shape, layout.scale_bytes))

    def read(self, slots: NDArray[np.intp], head: int) -> list[memoryview]:
        """Copies of one head's pieces in these slots: a run, as parts that follow each other."""
        local = self.heads.index(head)
        runs = [np.ascontiguousarray(part[slots, :, local]) for part in self._parts]
        return [run.reshape(-1).data for run in runs]

    def write(self, slots: NDArray[np.intp], head: int, run: NDArray[np.uint8]) -> None:
        """Put a run's pieces, (len(slots) * piece_bytes,), into these slots."""
        local = self.heads.index(head)
        first = 0
        for part in self._parts:
            shape = (len(slots), part.shape[1], part.shape[3])
            end = first + int(np.prod(shape))
            part[slots, :, local] = run[first:end].reshape(shape)
            first = end


def digest(parts: Sequence[memoryview]) -> bytes:
    """The SHA-256 of a run: the fastest sound hash that Python has, where the CPU helps with it."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()
