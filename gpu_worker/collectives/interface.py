"""What a group needs of whatever carries its exchanges: shared memory, or torch's backends."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from wire.errors import ForebayError


class CollectiveFailed(ForebayError):
    """An exchange between ranks cannot be completed; the group is of no use any more."""

    code: ClassVar[str] = "engine_failed"


class Collectives(Protocol):
    """One rank's end. All ranks make the same calls in the same order.

    What computes (`all_reduce`, `gather_columns`) is bounded by a timeout. What waits for another
    rank to load or to plan is not, for neither is a fault, but it ends when a rank dies. Raises
    CollectiveFailed, or what torch raises.
    """

    def all_reduce(self, values: Tensor) -> None:
        """Replace `values`, of any shape, by the sum over all ranks: the same bits on each."""

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """Rank 0 gets the ranks' `columns` (rows, widths[rank]) side by side; the others None.

        The result may be changed, and is valid until rank 0's next collective.
        """

    def minimum(self, value: int) -> int:
        """The least of the values that the ranks give, when all have given theirs."""

    def send(self, message: Tensor) -> None:
        """Rank 0 gives the others a (n,) int32 tensor; n may be 0."""

    def receive(self) -> Tensor:
        """The other ranks' end of `send`: a tensor of their own."""

    def close(self) -> None:
        """Leave the group."""
