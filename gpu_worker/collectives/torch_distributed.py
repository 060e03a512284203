"""Exchanges between ranks through torch: NCCL on GPUs, gloo where shared memory cannot be had."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_LOOPBACK = "lo"
_IDLE_TIMEOUT = timedelta(days=365)
"""Ranks wait this long for each other to load, and for a plan: neither is a fault, and a rank that
dies closes its sockets, which ends the wait at once."""

_HEAD_LEN = 4096
"""Elements of a message's first broadcast, its length among them: most messages need no second."""


class TorchCollectives:
    """Activations go over NCCL or gloo, within a timeout per collective.

    Messages and minima lie in CPU memory and always go over gloo, in a group of their own.
    """

    def __init__(
        self, rank: int, size: int, place: Path, device: torch.device, timeout_s: float
    ) -> None:
        """Meet the other ranks at the file `place`, which must not exist yet.

        It is a file because a TCP store would listen on every interface; gloo itself is bound to
        the loopback interface. This waits for the others as long as it takes.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
        os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK
        dist.init_process_group(
            backend="gloo",
            store=dist.FileStore(str(place), size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=_IDLE_TIMEOUT,
        )
        self._rank = rank
        self._control = dist.group.WORLD
        self._activations = dist.new_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
        )

    def all_reduce(self, values: Tensor) -> None:
        """See `Collectives`."""
        dist.all_reduce(values, group=self._activations)

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """Collectives want equal shapes, so narrower columns are padded on the way."""
        widest = max(widths)
        if columns.shape[1] < widest:
            columns = torch.nn.functional.pad(columns, (0, widest - columns.shape[1]))
        columns = columns.contiguous()
        if self._rank != 0:
            dist.gather(columns, group=self._activations)
            return None
        parts = [torch.empty_like(columns) for _ in widths]
        dist.gather(columns, parts, group=self._activations)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def minimum(self, value: int) -> int:
        """See `Collectives`."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box.item())

    def send(self, message: Tensor) -> None:
        """One broadcast, and a second one for a message that is longer than usual."""
        head = torch.zeros(_HEAD_LEN, dtype=torch.int32)
        head[0] = len(message)
        first = message[: _HEAD_LEN - 1]
        head[1 : 1 + len(first)] = first
        dist.broadcast(head, 0, group=self._control)
        rest = message[_HEAD_LEN - 1 :]
        if len(rest):
            dist.broadcast(rest.contiguous(), 0, group=self._control)

    def receive(self) -> Tensor:
        """See `Collectives`."""
        head = torch.empty(_HEAD_LEN, dtype=torch.int32)
        dist.broadcast(head, 0, group=self._control)
        length = int(head[0].item())
        if length < _HEAD_LEN:
            return head[1 : 1 + length]
        message = torch.empty(length, dtype=torch.int32)
        message[: _HEAD_LEN - 1] = head[1:]
        dist.broadcast(message[_HEAD_LEN - 1 :], 0, group=self._control)
        return message

    def close(self) -> None:
        """See `Collectives`."""
        dist.destroy_process_group()
