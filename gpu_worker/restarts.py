"""Whether ranks that were lost are started again, and when. Pure: the clock is passed in.

    lost ──> wait 0.5 s, 1 s, 2 s ... 30 s ──> start ──> ready ──> (a request is answered, or a
      ▲                                          │                  minute passes: from 0.5 s on)
      └──────────── not ready, 5 times in a row ─┴──> give up

Ranks that were never ready are not started again: whoever has just started the group is better
served by the reason, at once.
"""

from __future__ import annotations

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
SETTLED_AFTER_S = 60.0
MAX_FAILED_STARTS = 5


class RestartPolicy:
    """The starts and losses of one group's ranks, and what follows from them."""

    def __init__(self) -> None:
        self.num_restarts = 0
        self.num_failed_starts = 0  # since the ranks were last ready
        self._were_ready = False
        self._ready_since_s: float | None = None
        self._delay_s = FIRST_DELAY_S

    def ready(self, now_s: float) -> None:
        """The ranks have loaded the model."""
        self._were_ready = True
        self._ready_since_s = now_s
        self.num_failed_starts = 0

    def answered(self) -> None:
        """The ranks have answered a request: they work, whatever they may be lost to later."""
        self._delay_s = FIRST_DELAY_S

    def lost(self, now_s: float) -> float | None:
        """Seconds to wait before the next start; None to give up."""
        if self._ready_since_s is None:
            self.num_failed_starts += 1
        elif now_s - self._ready_since_s >= SETTLED_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        self._ready_since_s = None
        if not self._were_ready or self.num_failed_starts >= MAX_FAILED_STARTS:
            return None
        self.num_restarts += 1
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, MAX_DELAY_S)
        return delay_s
