"""Rank 0's sign that a long step gets on, from a thread that the step does not hold up.

A step may take longer than a hang may go unnoticed: what tells the two apart is that layers get
done. The model counts them, and a thread reports now and then that the count has moved; it is never
woken by the step, and costs it one addition per layer.
"""

from __future__ import annotations

import threading
from types import TracebackType

from gpu_worker.rank_protocol import RankChannel, StepProgress

_JOIN_TIMEOUT_S = 1.0


class LayerCounter:
    """Counts the layers that this rank has computed: one thread writes it, another one reads it."""

    __slots__ = ("num_layers",)

    def __init__(self) -> None:
        self.num_layers = 0

    def add(self) -> None:
        """One more layer is done."""
        self.num_layers += 1


class ProgressReporter:
    """While it is entered: sends a StepProgress every `interval_s` in which layers got done."""

    def __init__(self, channel: RankChannel, layers: LayerCounter, interval_s: float) -> None:
        self._channel = channel
        self._layers = layers
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def __enter__(self) -> ProgressReporter:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        # Not for ever: it may be sending to an orchestrator that does not read any more.
        self._thread.join(_JOIN_TIMEOUT_S)

    def _report(self) -> None:
        reported = self._layers.num_layers
        while not self._stop.wait(self._interval_s):
            num_layers = self._layers.num_layers
            if num_layers == reported:
                continue
            reported = num_layers
            try:
                self._channel.send(StepProgress(num_layers))
            except OSError:
                return  # the orchestrator is gone, as the main thread is about to find out
