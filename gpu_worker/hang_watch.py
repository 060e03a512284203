"""Telling ranks that hang from ranks that are slow. Pure: the clock is passed in.

Rank 0 reports every step, and during a long one that another layer is done; ranks that have
nothing to do report nothing. So ranks hang when there is work and no report for too long.
"""

from __future__ import annotations

MAX_GAP_S = 1.0
"""The time between two looks counts at most this much: whoever did not look for longer was itself
stopped or starved, and could not have seen a report."""


class HangWatch:
    """Adds up how long the ranks have had work and shown no progress."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._silent_s = 0.0
        self._looked_s: float | None = None  # when they were last seen to be busy

    def progress(self) -> None:
        """The ranks have reported that they get on."""
        self._silent_s = 0.0

    def is_hung(self, now_s: float, *, busy: bool) -> bool:
        """To be asked often; `busy`: whether the ranks have work at this moment."""
        if not busy:
            self._silent_s, self._looked_s = 0.0, None
            return False
        if self._looked_s is not None:
            self._silent_s += min(now_s - self._looked_s, MAX_GAP_S)
        self._looked_s = now_s
        return self._silent_s >= self._timeout_s
