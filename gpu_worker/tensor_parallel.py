"""The ranks of one worker group: collectives over activations, and the step plans they follow."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_worker.step_plan import StepPlan

_LOOPBACK = "lo"
_IDLE_TIMEOUT = timedelta(days=365)
"""Ranks wait this long for each other to load, and for a plan: neither is a fault, and a rank that
dies closes its sockets, which ends the wait at once."""


class TensorParallelGroup:
    """`size` processes that compute one model together; each is one `rank`.

    Activations are reduced over NCCL on GPUs and gloo on the CPU, within `timeout_s` per
    collective. Plans lie in CPU memory and always go over gloo, in a group of their own. A size of
    1 needs no process group, and every collective is then the identity.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        control: dist.ProcessGroup | None,
        activations: dist.ProcessGroup | None = None,
    ) -> None:
        """Use `single` or `connect`."""
        self.rank = rank
        self.size = size
        self._control = control
        self._activations = activations

    @classmethod
    def single(cls) -> TensorParallelGroup:
        """A group of one."""
        return cls(0, 1, None)

    @classmethod
    def connect(
        cls, rank: int, size: int, rendezvous: Path, device: torch.device, timeout_s: float
    ) -> TensorParallelGroup:
        """Meet the other ranks at the file `rendezvous`, which must not be left from another run.

        Every rank gives the same path, on a file system that all see. It is a file because a TCP
        store would listen on every interface; gloo itself is bound to the loopback interface.
        This waits for the others as long as it takes: whoever starts the ranks bounds their
        loading as a whole.
        """
        if size == 1:
            return cls.single()
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
        os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK
        dist.init_process_group(
            backend="gloo",
            store=dist.FileStore(str(rendezvous), size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=_IDLE_TIMEOUT,
        )
        activations = dist.new_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
        )
        return cls(rank, size, dist.group.WORLD, activations)

    def meet(self) -> None:
        """Wait until all ranks are here, however long it takes."""
        if self._control is not None:
            dist.barrier(group=self._control)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place on every rank."""
        if self.size > 1:
            dist.all_reduce(values, group=self._activations)
        return values

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """Rank 0 gets the ranks' `columns` (rows, widths[rank]) side by side; the others None.

        `widths` names every rank's width. Collectives want equal shapes, so narrower ones are
        padded on the way.
        """
        if self.size == 1:
            return columns
        widest = max(widths)
        if columns.shape[1] < widest:
            columns = torch.nn.functional.pad(columns, (0, widest - columns.shape[1]))
        columns = columns.contiguous()
        if self.rank != 0:
            dist.gather(columns, group=self._activations)
            return None
        parts = [torch.empty_like(columns) for _ in widths]
        dist.gather(columns, parts, group=self._activations)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def minimum(self, value: int) -> int:
        """The least of the values that the ranks give, on every rank."""
        if self._control is None:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box.item())

    def send_plan(self, plan: StepPlan | None) -> None:
        """Rank 0 gives all ranks the next plan. None tells them that there will be no more."""
        assert self.rank == 0
        if self._control is None:
            return
        packed = plan.pack() if plan is not None else torch.empty(0, dtype=torch.int32)
        dist.broadcast(torch.tensor([len(packed)], dtype=torch.int32), 0, group=self._control)
        if plan is not None:
            dist.broadcast(packed, 0, group=self._control)

    def receive_plan(self) -> StepPlan | None:
        """The other ranks' end of `send_plan`: wait for the next plan, however long it takes."""
        assert self._control is not None, "a group of one has nobody to receive from"
        length = torch.empty(1, dtype=torch.int32)
        dist.broadcast(length, 0, group=self._control)
        if length.item() == 0:
            return None
        packed = torch.empty(int(length.item()), dtype=torch.int32)
        dist.broadcast(packed, 0, group=self._control)
        return StepPlan.unpack(packed)

    def close(self) -> None:
        """Leave the group. No collective may follow."""
        if self._control is not None:
            dist.destroy_process_group()
            self._control = self._activations = None
