"""Where a reader stands in a request's output, and what of a chunk lies behind that.

The same output may be cut into chunks in different places: a server that lost its last second gets
a part of it again from another group, and a finished request's journal may be gone while its
result holds everything. So a reader's place is counted in tokens and in characters, and each chunk
is trimmed by both. The two are counted apart because text lags behind tokens: what may yet become
a stop string, or is half a character, is held back.

    output       t0 t1 t2 t3 t4 t5 t6 t7
    has read     [-----------]              StreamPosition(offset=4, ...)
    next chunk          [--------------]    offset=2: trimmed to t4 t5 t6
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.errors import ConfigError
from wire.messages import Chunk


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How much of a request's output a reader has: tokens, and characters of text.

    Two small integers, for whoever reads on later, or elsewhere, to keep: `stream(after=...)`
    goes on behind it. Raises ConfigError for negative numbers.
    """

    offset: int = 0
    text_offset: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no position."""
        if self.offset < 0 or self.text_offset < 0:
            raise ConfigError(f"{self} cannot be used: a position counts from 0")

    @classmethod
    def behind(cls, chunk: Chunk) -> StreamPosition:
        """Where a reader stands who has read a request's output up to and with `chunk`."""
        return cls(chunk.offset + len(chunk.token_ids), chunk.text_offset + len(chunk.text))


def rest_of(chunk: Chunk, position: StreamPosition) -> Chunk | None:
    """What of a chunk a reader at `position` does not have yet, None if nothing.

    A chunk that begins behind `position` is not for this function: see `is_gap`.
    """
    num_tokens = max(0, position.offset - chunk.offset)
    num_chars = max(0, position.text_offset - chunk.text_offset)
    token_ids, text = chunk.token_ids[num_tokens:], chunk.text[num_chars:]
    if not token_ids and not text:
        return None
    return Chunk(
        fence=chunk.fence,
        offset=chunk.offset + num_tokens,
        token_ids=token_ids,
        text=text,
        text_offset=chunk.text_offset + num_chars,
        logprobs=chunk.logprobs[num_tokens:] if chunk.logprobs else None,
    )


def is_gap(chunk: Chunk, position: StreamPosition) -> bool:
    """Whether something is missing between what a reader has and what a chunk brings."""
    return chunk.offset > position.offset or chunk.text_offset > position.text_offset
