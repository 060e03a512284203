"""An output that is known beforehand, to be written in any pieces, and compared as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from wire.codec import encode
from wire.ids import RequestId, token_ids
from wire.messages import Chunk, Result, TerminalState, TokenLogprob
from wire.scripts import Progress


class KnownOutput:
    """`num_tokens` tokens; every third one ends a piece of text, the others have none of their own.

    So text lags behind tokens, as that of real tokenizers and stop strings does.
    """

    def __init__(self, num_tokens: int, *, logprobs: bool = False) -> None:
        self.token_ids = token_ids(range(100, 100 + num_tokens))
        self._pieces = [f"[{index}]" if index % 3 == 2 else "" for index in range(num_tokens)]
        self._logprobs = tuple(TokenLogprob(100 + i, str(i), -float(i)) for i in range(num_tokens))
        self._with_logprobs = logprobs
        self.text = self.text_until(num_tokens)

    def text_until(self, stop: int) -> str:
        return "".join(self._pieces[:stop])

    def chunk(self, start: int, stop: int, *, fence: int = 1) -> Chunk:
        text_offset = len(self.text_until(start))
        return Chunk(
            fence=fence,
            offset=start,
            token_ids=self.token_ids[start:stop],
            text=self.text_until(stop)[text_offset:],
            text_offset=text_offset,
            logprobs=self._logprobs[start:stop] if self._with_logprobs else None,
        )

    def chunks(self, cuts: Iterable[int]) -> list[Chunk]:
        """All of it, cut in these places."""
        bounds = sorted({0, len(self.token_ids), *cuts})
        return [self.chunk(*pair) for pair in pairwise(bounds)]

    def progress(self, request_id: str, fence: int, start: int, stop: int) -> Progress:
        """What a group commits for these tokens."""
        chunk = encode(self.chunk(start, stop, fence=fence))
        rid = RequestId(request_id)
        return Progress(rid, fence, chunk, offset=start, num_tokens=stop - start)

    def result(self, request_id: str, state: TerminalState = "done") -> Result:
        return Result(
            RequestId(request_id),
            state,
            text=self.text,
            token_ids=self.token_ids,
            logprobs=self._logprobs if self._with_logprobs else None,
        )

    def end(self, request_id: str, fence: int, state: TerminalState = "done") -> Progress:
        """What a group commits at the end: all that is not journaled comes with the result."""
        result = encode(self.result(request_id, state))
        return Progress(RequestId(request_id), fence, state=state, result=result)


def assert_adds_up(chunks: Iterable[Chunk], expected: Result | KnownOutput) -> None:
    """The chunks follow each other without gap or repetition, and are the whole output."""
    tokens, text = token_ids(), ""
    for chunk in chunks:
        assert (chunk.offset, chunk.text_offset) == (len(tokens), len(text))
        tokens += chunk.token_ids
        text += chunk.text
    assert (tokens, text) == (expected.token_ids, expected.text)
