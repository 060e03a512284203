"""The journals of requests, read as they grow, by whoever waits for them."""

from __future__ import annotations

import asyncio
from functools import partial

from producer.reconciling import Reconciler
from producer.stream_reader import StreamReader
from wire.ids import RequestId
from wire.keys import Keys
from wire.streams import Entry


class Journals:
    """Waits for what comes in journals, but not for what will never come."""

    def __init__(self, reader: StreamReader, reconciler: Reconciler, keys: Keys) -> None:
        self._reader = reader
        self._reconciler = reconciler
        self._keys = keys

    async def next_entries(
        self, request_id: RequestId, after: bytes, *, num_read: int | None = None
    ) -> list[Entry]:
        """The next entries behind the id `after`, in order.

        None at all means: look at the record. The request has ended or is gone; or its journal
        holds more than the `num_read` tokens that the caller has, which then stand further ahead
        (a server that lost its last second may have set its clock back, too).
        """
        entries = self._reader.next_entries(self._keys.journal(request_id), after)
        with self._reconciler.watch(request_id, partial(_give_up, entries), num_read=num_read):
            return await entries


def _give_up(entries: asyncio.Future[list[Entry]]) -> None:
    if not entries.done():
        entries.set_result([])
