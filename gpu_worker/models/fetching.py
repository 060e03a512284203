"""Having a model's files read from the disk while nobody needs them yet."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

MAX_BYTES = 2**30
"""At most this much ahead: it must neither be evicted again before it is used, nor evict more."""

_PIECE_BYTES = 8 * 2**20
_SUFFIXES = (".gguf", ".safetensors")


def fetch_ahead(model_path: Path) -> None:
    """Begin to read the weights at `model_path` into the system's cache, and return at once.

    Ranks spend their first second importing torch, in which a disk reads hundreds of megabytes.
    Nothing depends on it, so no error comes of it.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        threading.Thread(target=_fetch, args=(model_path,), name="fetch", daemon=True).start()


def _fetch(model_path: Path) -> None:
    left = MAX_BYTES
    with contextlib.suppress(OSError):
        candidates = sorted(model_path.iterdir()) if model_path.is_dir() else [model_path]
        for path in (path for path in candidates if path.suffix in _SUFFIXES):
            left -= _fetch_file(path, left)
            if left <= 0:
                return


def _fetch_file(path: Path, max_bytes: int) -> int:
    """Returns how many bytes were asked for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size_bytes = min(os.fstat(descriptor).st_size, max_bytes)
        for offset in range(0, size_bytes, _PIECE_BYTES):
            # It blocks while the disk's queue is full, and so keeps the disk's pace.
            os.posix_fadvise(descriptor, offset, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    return size_bytes
