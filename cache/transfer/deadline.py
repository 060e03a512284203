"""A bound on the time of many operations together."""

from __future__ import annotations

import time

from cache.transfer.failures import TransferFailed


class Deadline:
    """`timeout_s` seconds from now."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """More than 0. Raises TransferFailed when nothing remains."""
        remaining_s = self._end_s - time.monotonic()
        if remaining_s <= 0:
            raise TransferFailed(f"not done after {self._timeout_s:.3g} s")
        return remaining_s
