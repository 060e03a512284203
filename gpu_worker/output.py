"""From an engine's tokens to what a request's reader gets: text, chunks, the result.

This is the orchestrator's half of a sequence: it turns tokens into text, ends the text at stop
strings, and cuts it into chunks for the journal. Tokens become text when somebody is to read it,
many at a time; only with stop strings, which may end the request, each as it comes.
"""

from __future__ import annotations

from collections import deque

from gpu_worker.rank_protocol import RawLogprob, SequenceOutput
from gpu_worker.text import TextDecoder
from wire.ids import RequestId, token_ids
from wire.messages import (
    Assignment,
    Chunk,
    ErrorInfo,
    FinishReason,
    Result,
    TerminalState,
    TokenLogprob,
    TopLogprob,
)

CONTEXT_TOKENS = 8
"""Prompt tokens that the decoder sees first: some tokenizers join words by what came before."""

MAX_CUTS = 1024
"""So many chunks can be written again: more than fit into the moments that a server may lose."""


class RequestOutput:
    """The output of one request so far.

    `chunk_tokens` is how many tokens make a chunk worth writing. `index` is the number by which
    the ranks name the sequence, once they have told.
    """

    def __init__(
        self, assignment: Assignment, decoder: TextDecoder, *, chunk_tokens: int = 1
    ) -> None:
        sampling = assignment.sampling
        self.assignment = assignment
        self.index: int | None = None
        self._decoder = decoder
        self._chunk_tokens = chunk_tokens
        self._stream = decoder.stream(assignment.prompt_token_ids[-CONTEXT_TOKENS:])
        self._token_ids = token_ids()
        self._text = ""
        self._num_decoded = 0
        self._num_unspoken = 0  # at the end: a stop token
        self._logprobs: list[TokenLogprob] = list(assignment.generated_logprobs or ())
        self._stop = sampling.stop
        self._longest_stop = max(map(len, sampling.stop), default=0)
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._error: ErrorInfo | None = None
        # What an earlier attempt has journaled is output too, but is not sent again.
        for token_id in assignment.generated:
            self._append(token_id)
        self._num_written_tokens = len(assignment.generated)
        # Tokens and characters up to the end of each of the latest chunks.
        self._cuts = deque(
            [(len(assignment.generated), len(assignment.generated_text))], maxlen=MAX_CUTS
        )
        self._note_cut()

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.assignment.request_id

    @property
    def state(self) -> TerminalState | None:
        """How the request has ended, None while it goes on."""
        if self._error is not None:
            return "failed"
        return None if self._finish_reason is None else "done"

    @property
    def num_unsent_tokens(self) -> int:
        """How many tokens are in no chunk yet."""
        return len(self._token_ids) - self._cuts[-1][0]

    @property
    def has_chunk(self) -> bool:
        """Whether there are enough tokens for a chunk."""
        return len(self._token_ids) >= self._next_cut

    def add_token(self, token_id: int) -> bool:
        """Take in a token, and no more of a step's output. Returns True if that has consequences.

        Either there are enough tokens for a chunk, or a stop string has ended the request (`state`
        tells): then the engine must be told to stop the sequence.
        """
        self._token_ids.append(token_id)
        if self._stop and self._reaches_stop():
            self._finish_reason = "stop"
            return True
        return len(self._token_ids) >= self._next_cut

    def add(self, output: SequenceOutput) -> bool:
        """Take in a step's output. Returns True when a stop string ended it before the engine did.

        Then the engine must be told to stop the sequence.
        """
        self._num_cached_tokens = output.num_cached_tokens
        self._error = output.error
        # A stop token ends the text and is not part of it; it counts as generated nevertheless.
        num_spoken = len(output.token_ids) - (output.stop_token_id is not None)
        for index, token_id in enumerate(output.token_ids):
            if output.logprobs is not None:
                self._logprobs.append(self._logprob(output.logprobs[index]))
            if index >= num_spoken:
                self._token_ids.append(token_id)
                self._num_unspoken += 1
            elif self._append(token_id):
                self._finish_reason = "stop"
                return output.finish_reason is None
        self._finish_reason = output.finish_reason
        if output.stop_token_id in self.assignment.sampling.stop_token_ids:
            self._stop_reason = output.stop_token_id
        return False

    def take_chunk(self, *, ended: bool) -> Chunk | None:
        """What is new since the last chunk, None if nothing is.

        Until the request has `ended`, text that may yet turn out to be a stop string is held back.
        """
        if not self.num_unsent_tokens:
            return None
        self._decode()
        offset, start = self._cuts[-1]
        end = max(start, len(self._text) if ended else self._num_settled_chars())
        self._cuts.append((len(self._token_ids), end))
        self._note_cut()
        return Chunk(
            fence=self.assignment.fence,
            offset=offset,
            token_ids=self._token_ids[offset:],
            text=self._text[start:end],
            text_offset=start,
            logprobs=tuple(self._logprobs[offset:]) if self._logprobs else None,
        )

    def written(self, num_tokens: int) -> None:
        """The chunks of the first `num_tokens` are in the journal, as far as anybody knows."""
        self._num_written_tokens = num_tokens

    def rewind(self, num_journaled: int) -> bool:
        """The journal has `num_journaled` tokens. If it had more, they become new again."""
        if num_journaled >= self._num_written_tokens:
            return False
        self._num_written_tokens = num_journaled
        while len(self._cuts) > 1 and self._cuts[-1][0] > num_journaled:
            self._cuts.pop()
        self._note_cut()
        return True

    def result(self, state: TerminalState, model: str, error: ErrorInfo | None = None) -> Result:
        """The terminal result; what was generated is in it also when it ended half way."""
        self._decode()
        return Result(
            self.request_id,
            state,
            model=model,
            text=self._text,
            token_ids=self._token_ids,
            finish_reason=self._finish_reason if state == "done" else None,
            stop_reason=self._stop_reason,
            num_prompt_tokens=len(self.assignment.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens,
            logprobs=tuple(self._logprobs) if self._logprobs else None,
            error=error or self._error,
        )

    def _append(self, token_id: int) -> bool:
        """Add a token. Returns True when the text has reached a stop string with it."""
        self._token_ids.append(token_id)
        return bool(self._stop) and self._reaches_stop()

    def _decode(self) -> None:
        """Have the text of all tokens so far."""
        end = len(self._token_ids) - self._num_unspoken
        if self._num_decoded < end:
            self._text += self._stream.take(self._token_ids[self._num_decoded : end])
            self._num_decoded = end

    def _reaches_stop(self) -> bool:
        """Whether the latest token ends the text; if so, cut it there."""
        searched = len(self._text)
        self._decode()
        if len(self._token_ids) <= self.assignment.sampling.min_tokens:
            return False
        # Only what ends in the new text: one that came within `min_tokens` does not count.
        found = [
            (self._text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in self._stop
        ]
        first = min(((at, stop) for at, stop in found if at >= 0), default=None)
        if first is None:
            return False
        self._text = self._text[: first[0]]
        self._stop_reason = first[1]
        return True

    def _note_cut(self) -> None:
        self._next_cut = self._cuts[-1][0] + self._chunk_tokens

    def _num_settled_chars(self) -> int:
        """How much of the text cannot become part of a stop string any more."""
        longest = min(self._longest_stop - 1, len(self._text))
        for length in range(longest, 0, -1):
            tail = self._text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return len(self._text) - length
        return len(self._text)

    def _logprob(self, raw: RawLogprob) -> TokenLogprob:
        text = self._decoder.token_text
        return TokenLogprob(
            raw.token_id,
            text(raw.token_id),
            raw.logprob,
            tuple(
                TopLogprob(token_id, text(token_id), logprob)
                for token_id, logprob in zip(raw.top_token_ids, raw.top_logprobs, strict=True)
            ),
        )
