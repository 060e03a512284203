"""A request's output as it comes, from any position, exactly once.

    journal entries -> trimmed to what the reader does not have -> chunks
    the end         -> what the result has beyond the journal   -> one chunk more

The journal gives tokens while the request runs. The result is asked for at the end, because the
journal of a request that does not stream is emptied then, and whenever the journal says nothing
for long (`Journals.next_entries`), because it may have been lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from producer.completions import Completions
from producer.journals import Journals
from producer.position import StreamPosition, is_gap, rest_of
from wire.errors import WireError
from wire.ids import RequestId
from wire.messages import Chunk, Result
from wire.records import journal_entry
from wire.streams import START


class OutputStream:
    """One reader of a request's output, who has read up to `position`."""

    def __init__(
        self,
        journals: Journals,
        completions: Completions,
        request_id: RequestId,
        position: StreamPosition,
    ) -> None:
        self._journals = journals
        self._completions = completions
        self._request_id = request_id
        self._position = position
        self._read_up_to = START
        self._is_second_look = False

    async def journaled(self, *, is_new: bool) -> AsyncGenerator[Chunk, None]:
        """What the journal brings, until the request has ended.

        A journal that is shorter than what the reader has (its server lost its last second) says
        nothing new until it has caught up. `is_new`: the request has only just been submitted, so
        there is no need to ask first whether it is known, or has ended. Raises ResultGone if there
        is no such request (any more), and WireError.
        """
        if not is_new and await self._is_over():
            return
        while True:
            entries = await self._journals.next_entries(
                self._request_id, self._read_up_to, num_read=self._position.offset
            )
            if not entries:
                if await self._is_over():
                    return
                self._read_up_to = START
            for entry_id, fields in entries:
                entry = journal_entry(entry_id, fields)
                if entry.state is not None:
                    return
                assert entry.chunk is not None
                if is_gap(entry.chunk, self._position):
                    self._look_again(entry.chunk)
                    break
                self._read_up_to = entry_id
                if (rest := self._advance(entry.chunk)) is not None:
                    yield rest

    def beyond_journal(self, result: Result) -> Chunk | None:
        """What the journal did not bring, None if it brought everything."""
        return self._advance(
            Chunk(
                fence=0,
                offset=0,
                token_ids=result.token_ids,
                text=result.text,
                text_offset=0,
                logprobs=result.logprobs,
            )
        )

    def _advance(self, chunk: Chunk) -> Chunk | None:
        rest = rest_of(chunk, self._position)
        if rest is not None:
            self._position = StreamPosition.behind(rest)
            self._is_second_look = False
        return rest

    def _look_again(self, chunk: Chunk) -> None:
        """What is missing before `chunk` may have come behind our back: begin anew, once."""
        if self._is_second_look:
            raise WireError(
                f"the journal of request {self._request_id!r} goes on with token {chunk.offset} "
                f"and character {chunk.text_offset} where {self._position} was reached"
            )
        self._read_up_to, self._is_second_look = START, True

    async def _is_over(self) -> bool:
        outcome = await self._completions.look(self._request_id)
        if isinstance(outcome, Result):
            return True
        if outcome is not None:
            raise outcome
        return False
