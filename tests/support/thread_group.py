"""A tensor-parallel group within one process: one thread per rank, sums taken in rank order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup

T = TypeVar("T")
_TIMEOUT_S = 60.0


class _Meeting:
    """Where all ranks put down a value and pick up everybody's."""

    def __init__(self, size: int) -> None:
        self._slots: list[object] = [None] * size
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)

    def exchange(self, rank: int, value: T) -> list[T]:
        self._slots[rank] = value
        self._barrier.wait()
        everybody = list(self._slots)
        self._barrier.wait()
        return everybody  # type: ignore[return-value]

    def abort(self) -> None:
        self._barrier.abort()


class ThreadGroup(TensorParallelGroup):
    """One rank's end of a group of threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size, None)
        self._meeting = meeting

    def all_reduce(self, values: Tensor) -> Tensor:
        parts = self._meeting.exchange(self.rank, values.clone())
        return values.copy_(torch.stack(parts).sum(0))

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        parts = self._meeting.exchange(self.rank, columns)
        assert tuple(part.shape[1] for part in parts) == widths
        return torch.cat(parts, 1) if self.rank == 0 else None

    def send_plan(self, plan: StepPlan | None) -> None:
        self._meeting.exchange(self.rank, None if plan is None else plan.pack())

    def receive_plan(self) -> StepPlan | None:
        offers: list[Tensor | None] = self._meeting.exchange(self.rank, None)
        packed = offers[0]
        return None if packed is None else StepPlan.unpack(packed)

    def minimum(self, value: int) -> int:
        return min(self._meeting.exchange(self.rank, value))


def run_as_ranks(size: int, work: Callable[[TensorParallelGroup], T]) -> list[T]:
    """What `work` returns on each rank of a group of `size`, by rank."""
    meeting = _Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, size, meeting))
        except BaseException:
            meeting.abort()  # nobody must wait for a rank that has failed
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
