"""What an exporting group has promised: these blocks, in these slots, until then.

Rank 0 of the exporter writes a ticket, and every one of its ranks can tell that it is genuine by
its MAC, without asking. Its end is a time of the machine's monotonic clock, which all processes of
one machine read alike and nobody can set: the ranks of a group share a machine. Importers are told
a duration instead.

    MAC | msgpack of `Ticket`      MAC = HMAC-SHA256(ticket key, the rest)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache.transfer.failures import TransferFailed
from cache.transfer.keys import MAC_BYTES, TransferKeys, is_mac, mac
from cache.transfer.messages import HASH_BYTES
from wire.codec import decode, encode
from wire.errors import InvalidRequest, WireError
from wire.ids import GroupId, TokenIds, token_ids

MAX_BLOCKS = 32_768


@dataclass(frozen=True, slots=True)
class Ticket:
    """`slots` are host slots, the same on all ranks of the group; `hashes` name what is in them.

    `slots` are packed as unsigned 32-bit integers; `hashes` have HASH_BYTES each. `end_s` is a
    time of `time.monotonic`.
    """

    lease_id: int
    group_id: GroupId
    epoch: int
    importer: GroupId
    slots: TokenIds
    hashes: bytes
    end_s: float

    def __post_init__(self) -> None:
        """Raise WireError unless slots and hashes match."""
        if len(self.slots) * HASH_BYTES != len(self.hashes):
            raise WireError(f"{len(self.slots)} slots for {len(self.hashes)} bytes of hashes")

    @property
    def num_blocks(self) -> int:
        """As many as there are slots."""
        return len(self.slots)


def read_ticket(data: bytes, keys: TransferKeys) -> Ticket:
    """Raises TransferFailed unless a rank of this fleet wrote it."""
    body = data[MAC_BYTES:]
    if not is_mac(mac(keys.ticket, body), data[:MAC_BYTES]):
        raise TransferFailed("the ticket is not genuine")
    try:
        return decode(Ticket, body)
    except (WireError, InvalidRequest) as error:
        raise TransferFailed(str(error)) from error


class TicketOffice:
    """Writes and checks the tickets of one group in one epoch; of any of its ranks."""

    def __init__(
        self,
        keys: TransferKeys,
        group_id: GroupId,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._group_id = group_id
        self._epoch = epoch
        self._clock = clock

    def write(
        self, lease_id: int, importer: GroupId, slots: Sequence[int], hashes: bytes, end_s: float
    ) -> bytes:
        """A ticket for the slots, which hold the blocks of these hashes."""
        assert 0 < len(slots) <= MAX_BLOCKS
        body = encode(
            Ticket(
                lease_id=lease_id,
                group_id=self._group_id,
                epoch=self._epoch,
                importer=importer,
                slots=token_ids(slots),
                hashes=hashes,
                end_s=end_s,
            )
        )
        return mac(self._keys.ticket, body) + body

    def check(self, data: bytes, importer: GroupId) -> Ticket:
        """Raises TransferFailed unless we wrote it for `importer`; it may have ended."""
        ticket = read_ticket(data, self._keys)
        if (ticket.group_id, ticket.epoch) != (self._group_id, self._epoch):
            raise TransferFailed("the ticket is another group's, or of another epoch")
        if ticket.importer != importer:
            raise TransferFailed("the ticket was given to another group")
        return ticket

    def remaining_s(self, ticket: Ticket) -> float:
        """More than 0. Raises TransferFailed when the ticket has ended."""
        remaining_s = ticket.end_s - self._clock()
        if remaining_s <= 0:
            raise TransferFailed("the ticket has ended")
        return remaining_s
