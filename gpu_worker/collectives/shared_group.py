"""One rank's end of a group in shared memory: the compiled library's exchanges."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gpu_worker.collectives.interface import CollectiveFailed
from gpu_worker.kernels.library import INT64, POINTER, shared_object

_REASONS = {
    1: "the other ranks did not come within {timeout_s:g} s",
    2: "another rank is gone",
    3: "another rank has given up",
}
_FOREVER_NS = -1
_MAX_RANKS = 64
"""What the segment has room for (`kernels/src/shared_group.h`)."""

_SIGNATURES: dict[str, tuple[type[ctypes._SimpleCData[Any]] | None, list[Any]]] = {
    "fb_group_segment_bytes": (INT64, [INT64]),
    "fb_group_join": (POINTER, [POINTER, INT64, INT64, POINTER, INT64]),
    "fb_group_leave": (None, [POINTER]),
    "fb_group_all_reduce": (ctypes.c_int32, [POINTER, POINTER, INT64, INT64]),
    "fb_group_gather": (
        ctypes.c_int32,
        [POINTER, POINTER, INT64, INT64, POINTER, INT64, INT64],
    ),
    "fb_group_minimum": (ctypes.c_int32, [POINTER, POINTER, INT64]),
    "fb_group_post": (ctypes.c_int32, [POINTER, POINTER, INT64, INT64]),
    "fb_group_await": (ctypes.c_int32, [POINTER, POINTER, INT64]),
    "fb_group_take": (ctypes.c_int32, [POINTER, POINTER, INT64, INT64]),
}


def is_available(size: int) -> bool:
    """Whether `size` ranks can be a group: the library is there, whatever the processor, and it
    takes so many.
    """
    return size <= _MAX_RANKS and shared_object() is not None


def segment_bytes(size: int) -> int:
    """The shared memory that a group of `size` ranks needs."""
    num_bytes: int = _library().fb_group_segment_bytes(size)
    return num_bytes


class SharedGroup:
    """One rank's end of a group in shared memory. Tensors are contiguous and on the CPU.

    Every method but `join` and `leave` is a collective, and raises CollectiveFailed if it cannot
    be completed: within `timeout_s`, or because another rank is gone.
    """

    def __init__(
        self, address: int, rank: int, size: int, peer_fds: Sequence[int], timeout_s: float
    ) -> None:
        """Join in memory at `address`, zeros at first, that stays mapped until `leave`.

        `peer_fds` are descriptors that become readable when a rank ends.
        """
        self._library = _library()
        fds = (ctypes.c_int32 * len(peer_fds))(*peer_fds)
        self._handle = self._library.fb_group_join(address, rank, size, fds, len(peer_fds))
        if not self._handle:
            raise CollectiveFailed(f"there is no group of {size} ranks in shared memory")
        self._timeout_s = timeout_s
        self._timeout_ns = int(timeout_s * 1e9)
        self._all_reduce = self._library.fb_group_all_reduce

    def all_reduce(self, values: Tensor) -> None:
        """Replace the float32 `values` by the sums over all ranks."""
        status = self._all_reduce(self._handle, values.data_ptr(), values.numel(), self._timeout_ns)
        if status:
            raise self._failure(status)

    def gather(self, columns: Tensor, target: int, stride: int) -> None:
        """Write float32 `columns` into rows `stride` floats apart, the first one at `target`.

        `target` lies in rank 0's shared memory. On rank 0 this returns when all have written.
        """
        num_rows, width = columns.shape
        self._check(
            self._library.fb_group_gather(
                self._handle,
                columns.data_ptr(),
                num_rows,
                width,
                target,
                stride,
                self._timeout_ns,
            )
        )

    def minimum(self, value: int) -> int:
        """The least of all ranks' values. It waits for them without a limit."""
        box = INT64(value)
        self._check(self._library.fb_group_minimum(self._handle, ctypes.byref(box), _FOREVER_NS))
        return box.value

    def post(self, message: Tensor) -> None:
        """Rank 0: give `message` to the others."""
        self._check(
            self._library.fb_group_post(
                self._handle, message.data_ptr(), message.nbytes, self._timeout_ns
            )
        )

    def wait_for_message(self) -> int:
        """The others: the next message's bytes. It waits without a limit; `take` must follow."""
        box = INT64()
        self._check(self._library.fb_group_await(self._handle, ctypes.byref(box), _FOREVER_NS))
        return box.value

    def take(self, message: Tensor) -> None:
        """Copy the message that `wait_for_message` announced."""
        self._check(
            self._library.fb_group_take(
                self._handle, message.data_ptr(), message.nbytes, self._timeout_ns
            )
        )

    def leave(self) -> None:
        """Nothing may follow."""
        self._library.fb_group_leave(self._handle)
        self._handle = None

    def _check(self, status: int) -> None:
        if status:
            raise self._failure(status)

    def _failure(self, status: int) -> CollectiveFailed:
        reason = _REASONS[status].format(timeout_s=self._timeout_s)
        return CollectiveFailed(f"a collective has failed: {reason}")


def _library() -> ctypes.CDLL:
    library = shared_object()
    assert library is not None, "is_available says whether it is there"
    for name, (result, arguments) in _SIGNATURES.items():
        kernel = getattr(library, name)
        kernel.restype = result
        kernel.argtypes = arguments
    return library
