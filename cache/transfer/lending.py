"""What the engine of an exporting group decides about its blocks, as the server asks it.

The server's threads ask; the engine answers between two of its steps, whenever that is. It must
call `set_running_or_notify_cancel` on the future before it holds blocks for a request: a peer that
has stopped waiting has cancelled it.

Blocks of a loan lie in host memory of *every* rank of the group by the time the future is answered
(a step whose plan has copied them there is over on rank 0, which it cannot be before all ranks
have begun it), and stay there, unchanged, until `end_s` or until they are released.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from cache.transfer.messages import LeaseRequest, RankSource


@dataclass(frozen=True, slots=True)
class Loan:
    """The first `len(slots)` of the blocks asked for lie in these host slots, on all `ranks`.

    `end_s` is a time of `time.monotonic`; until then the slots stay as they are.
    """

    lease_id: int
    slots: tuple[int, ...]
    end_s: float
    ranks: tuple[RankSource, ...]


class Lender(Protocol):
    """The engine's side. Its methods are called from the server's threads, and return at once."""

    def lend(self, request: LeaseRequest) -> Future[Loan | None]:
        """Answered later; with None if there is nothing to be had."""

    def release(self, lease_id: int) -> None:
        """Nobody reads what was lent any more. The lease may be unknown, or over."""
