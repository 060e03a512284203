"""Reading a group's inbox stream: batches of assignments, and cancellations.

The stream belongs to one life (epoch) of one group, so there is one reader and its position is
enough; what is lost with the group is found again through the requests' records.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from redis.asyncio import Redis

from wire.codec import decode
from wire.errors import ForebayError
from wire.ids import GroupId, RequestId
from wire.keys import Keys
from wire.messages import Assignment, ErrorInfo
from wire.records import error_info
from wire.streams import START, read

BLOCK_MS = 2000
MAX_ENTRIES = 64
_ASSIGNMENT = "assignment:"


@dataclass(frozen=True, slots=True)
class Undecodable:
    """An assignment that breaks the wire format; its field's name still tells whose it is."""

    request_id: RequestId
    fence: int
    error: ErrorInfo


@dataclass(slots=True)
class Mail:
    """What one read brought."""

    assignments: list[Assignment] = field(default_factory=list)
    undecodable: list[Undecodable] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)


class Inbox:
    """The inbox of the group's present life; `open` it before reading."""

    def __init__(self, client: Redis, blocking_client: Redis, keys: Keys) -> None:
        self._client = client
        self._blocking_client = blocking_client
        self._keys = keys
        self._key = ""
        self._position = START
        self._to_delete: list[bytes] = []

    @property
    def position(self) -> bytes:
        """The last entry that was read."""
        return self._position

    def open(self, group_id: GroupId, epoch: int) -> None:
        """Turn to the inbox of a new life."""
        self._key = self._keys.inbox(group_id, epoch)
        self._position = START
        self._to_delete = []

    async def read(self) -> Mail:
        """Wait for mail, up to two seconds; what was read before does not come again."""
        arrived = await read(
            self._blocking_client,
            {self._key: self._position},
            count=MAX_ENTRIES,
            block_ms=BLOCK_MS,
        )
        mail = Mail()
        for entry_id, fields in arrived.get(self._key, []):
            self._to_delete.append(entry_id)
            for name, value in fields.items():
                _sort_in(mail, name.decode(), value)
            self._position = entry_id
        return mail

    async def delete_read(self) -> None:
        """Free what was read; after an error, the next call frees it as well."""
        if self._to_delete:
            await self._client.xdel(self._key, *self._to_delete)
            self._to_delete = []


def _sort_in(mail: Mail, name: str, value: bytes) -> None:
    if name == "cancel":
        mail.cancelled.append(RequestId(value.decode()))
    elif name.startswith(_ASSIGNMENT):
        try:
            mail.assignments.append(decode(Assignment, value))
        except ForebayError as error:
            _, fence, request_id = name.split(":", 2)
            mail.undecodable.append(
                Undecodable(RequestId(request_id), int(fence), error_info(error))
            )
