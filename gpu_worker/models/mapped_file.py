"""A file of weights, of which pieces are mapped into memory as they are needed.

Each piece is a mapping of its own, which ends with the last array that looks at it: what was read
and packed elsewhere no longer counts as memory of ours, though the system may keep it cached.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt


class MappedFile:
    """One file, open for reading as long as this object lives; usable from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of `size_bytes` bytes from `offset` on, or of what the file has of them."""
        return os.pread(self._descriptor, size_bytes, offset)

    def map(self, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """`size_bytes` bytes from `offset` on, at least one, without a copy.

        The system is told to fetch all of them at once, with large reads, while the caller begins
        at the first. They can be written to, which changes no file. Raises ValueError if the file
        ends before.
        """
        descriptor = self._descriptor
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_WILLNEED)
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # Private and writable: torch warns of arrays that cannot be written to.
        mapped = mmap.mmap(
            descriptor, offset + size_bytes - start, access=mmap.ACCESS_COPY, offset=start
        )
        return np.frombuffer(mapped, np.uint8, size_bytes, offset - start)
