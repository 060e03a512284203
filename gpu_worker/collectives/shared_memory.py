"""Exchanges between ranks of one machine whose tensors lie in its memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.collectives.meeting import Meeting, meet
from gpu_worker.collectives.shared_group import SharedGroup, segment_bytes

_FLOAT_BYTES = 4


class SharedMemoryCollectives:
    """Ranks write where the others read, and sleep in the kernel where a wait becomes long.

    Rank 0's matrix of gathered columns lies behind the segment of `SharedGroup` and grows with
    what is asked for: every rank writes its columns in place.
    """

    def __init__(self, rank: int, size: int, place: Path, timeout_s: float) -> None:
        """Meet the other ranks at `place`, which must not exist yet, however long it takes."""
        self._rank = rank
        self._matrix_offset = _whole_pages(segment_bytes(size))
        self._meeting: Meeting = meet(rank, size, place, self._matrix_offset)
        self._segment = mmap.mmap(self._meeting.memory_fd, self._matrix_offset)
        self._matrix = torch.empty(0)
        self._group = SharedGroup(
            ctypes.addressof(ctypes.c_char.from_buffer(self._segment)),
            rank,
            size,
            [peer.fileno() for peer in self._meeting.peers],
            timeout_s,
        )

    def all_reduce(self, values: Tensor) -> None:
        """Sums are taken in float32 and in the order of the ranks, whatever the dtype."""
        if values.dtype == torch.float32 and values.is_contiguous():
            self._group.all_reduce(values)
            return
        sums = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._group.all_reduce(sums)
        values.copy_(sums)

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """The result is a view of the shared memory, in float32."""
        num_rows, stride = len(columns), sum(widths)
        if self._matrix.numel() < num_rows * stride:
            self._enlarge_matrix(num_rows * stride)
        first_column = sum(widths[: self._rank])
        target = self._matrix.data_ptr() + first_column * _FLOAT_BYTES
        self._group.gather(columns.to(torch.float32).contiguous(), target, stride)
        if self._rank != 0:
            return None
        return self._matrix[: num_rows * stride].view(num_rows, stride)

    def minimum(self, value: int) -> int:
        """See `Collectives`."""
        return self._group.minimum(value)

    def send(self, message: Tensor) -> None:
        """One write that all ranks read; it waits only for a rank that is two messages behind."""
        self._group.post(message)

    def receive(self) -> Tensor:
        """See `Collectives`."""
        message = torch.empty(self._group.wait_for_message() // 4, dtype=torch.int32)
        self._group.take(message)
        return message

    def close(self) -> None:
        """A result of `gather_columns` that somebody keeps stays readable."""
        self._group.leave()
        self._meeting.close()

    def _enlarge_matrix(self, num_floats: int) -> None:
        """All ranks come here in the same call, for all see the same shapes."""
        # Twice of what is asked, as it is asked for more and more while requests come in; memory
        # that was not written to does not exist yet.
        num_bytes = _whole_pages(2 * num_floats * _FLOAT_BYTES)
        if self._rank == 0:
            os.ftruncate(self._meeting.memory_fd, self._matrix_offset + num_bytes)
        self._group.minimum(0)
        mapped = mmap.mmap(self._meeting.memory_fd, num_bytes, offset=self._matrix_offset)
        self._matrix = torch.frombuffer(mapped, dtype=torch.float32)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
