"""Checking one's own books when there is nothing else to do."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_SHARE = 0.01
"""Of the time: a check of a large cache takes longer than a request should have to wait for."""


class IdleCheck:
    """Runs a check in idle moments, so seldom that it takes at most MAX_SHARE of the time."""

    def __init__(
        self, check: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._check = check
        self._clock = clock
        self._not_before_s = clock()

    def run(self) -> None:
        """The work has just run out. Raises what the check raises."""
        started_s = self._clock()
        if started_s < self._not_before_s:
            return
        self._check()
        self._not_before_s = started_s + (self._clock() - started_s) / MAX_SHARE
