"""Paged attention by the compiled kernels, which read the pages where they lie."""

from __future__ import annotations

from torch import Tensor

from cache.pages import KVPages, LayerPages
from gpu_worker.attention.interface import HeadMap
from gpu_worker.kernels.attention import AttentionMemory, PlannedAttention
from gpu_worker.step_plan import StepPlan


class NativeAttention:
    """An `AttentionBackend` for float32 activations on the CPU: `NativeAttention()` is one.

    It serves one step at a time: a step's attention ends with the preparation of the next.
    """

    def __init__(self) -> None:
        """Begin without memory."""
        self._memory = AttentionMemory()
        self._step: _StepAttention | None = None

    @property
    def num_items(self) -> int:
        """Items that the latest step was cut into, for each key/value head."""
        return 0 if self._step is None else self._step.num_items

    def __call__(self, plan: StepPlan, pages: KVPages) -> _StepAttention:
        """Prepare a step."""
        self._step = _StepAttention(plan, pages, self._memory)
        return self._step


class _StepAttention:
    """One step's attention, planned when the first layer tells which heads there are."""

    def __init__(self, plan: StepPlan, pages: KVPages, memory: AttentionMemory) -> None:
        self._plan = plan
        self._shape = pages.shape
        self._memory = memory
        self._heads: HeadMap | None = None
        self._planned: PlannedAttention | None = None

    @property
    def num_items(self) -> int:
        return 0 if self._planned is None else self._planned.num_items

    def __call__(self, query: Tensor, pages: LayerPages, heads: HeadMap, scale: float) -> Tensor:
        """See `PagedAttention`; rows of `query` may stand apart. All is float32 but the pages."""
        if self._planned is None or heads is not self._heads:
            self._planned = PlannedAttention(
                self._plan, self._shape, heads.kv_head_of_query, self._memory
            )
            self._heads = heads
        return self._planned(query, pages, scale)
