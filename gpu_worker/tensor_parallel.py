"""The ranks of one worker group: collectives over activations, and the step plans they follow."""

from __future__ import annotations

from pathlib import Path

import structlog
import torch
from torch import Tensor

from gpu_worker.collectives import meeting, shared_group
from gpu_worker.collectives.interface import Collectives
from gpu_worker.step_plan import StepPlan

_NO_MORE_PLANS = torch.empty(0, dtype=torch.int32)


class TensorParallelGroup:
    """`size` processes that compute one model together; each is one `rank`.

    A size of 1 needs no collectives: every one is then the identity.
    """

    def __init__(self, rank: int, size: int, collectives: Collectives | None) -> None:
        """Use `single` or `connect`."""
        self.rank = rank
        self.size = size
        self._collectives = collectives

    @classmethod
    def single(cls) -> TensorParallelGroup:
        """A group of one."""
        return cls(0, 1, None)

    @classmethod
    def connect(
        cls, rank: int, size: int, rendezvous: Path, device: torch.device, timeout_s: float
    ) -> TensorParallelGroup:
        """Meet the other ranks at the path `rendezvous`, at which no file may exist yet.

        Every rank gives the same path, in a directory that only this user can enter. This waits
        for the others as long as it takes: whoever starts the ranks bounds their loading as a
        whole. `timeout_s` bounds each exchange of activations.
        """
        if size == 1:
            return cls.single()
        return cls(rank, size, _collectives(rank, size, rendezvous, device, timeout_s))

    def meet(self) -> None:
        """Wait until all ranks are here, however long it takes."""
        self.minimum(0)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place on every rank."""
        if self._collectives is not None:
            self._collectives.all_reduce(values)
        return values

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """Rank 0 gets the ranks' `columns` (rows, widths[rank]) side by side; the others None.

        `widths` names every rank's width. The result may be changed, and is valid until rank 0's
        next collective.
        """
        if self._collectives is None:
            return columns
        return self._collectives.gather_columns(columns, widths)

    def minimum(self, value: int) -> int:
        """The least of the values that the ranks give, on every rank."""
        return value if self._collectives is None else self._collectives.minimum(value)

    def send_plan(self, plan: StepPlan | None) -> None:
        """Rank 0 gives all ranks the next plan. None tells them that there will be no more."""
        assert self.rank == 0
        if self._collectives is not None:
            self._collectives.send(_NO_MORE_PLANS if plan is None else plan.pack())

    def receive_plan(self) -> StepPlan | None:
        """The other ranks' end of `send_plan`: wait for the next plan, however long it takes."""
        assert self._collectives is not None, "a group of one has nobody to receive from"
        packed = self._collectives.receive()
        return StepPlan.unpack(packed) if len(packed) else None

    def close(self) -> None:
        """Leave the group. No collective may follow."""
        if self._collectives is not None:
            self._collectives.close()
            self._collectives = None


def _collectives(
    rank: int, size: int, rendezvous: Path, device: torch.device, timeout_s: float
) -> Collectives:
    """All ranks come to the same choice: they run on one machine, from one installation."""
    log = structlog.get_logger(__name__)
    if device.type == "cpu" and meeting.is_possible() and shared_group.is_available(size):
        from gpu_worker.collectives.shared_memory import SharedMemoryCollectives

        log.info("collectives_chosen", rank=rank, collectives="shared memory")
        return SharedMemoryCollectives(rank, size, rendezvous, timeout_s)

    # Not at the top: most ranks need nothing of it.
    from gpu_worker.collectives.torch_distributed import TorchCollectives

    chosen = "NCCL" if device.type == "cuda" else "gloo"
    reason = "a GPU" if device.type == "cuda" else "no kernels, too many ranks, or not Linux"
    log.info("collectives_chosen", rank=rank, collectives=chosen, reason=reason)
    return TorchCollectives(rank, size, rendezvous, device, timeout_s)
