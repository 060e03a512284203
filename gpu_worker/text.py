"""From tokens to text: any number of tokens at a time, and the same text however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from wire.ids import TokenIds

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are no character, or not yet."""


class TextDecoder:
    """The tokenizer of a model, for decoding."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)

    def stream(self, context: TokenIds) -> TextStream:
        """A decoder for one sequence that begins behind the tokens of `context`."""
        return TextStream(self._tokenizer, context)

    def _token_text(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class TextStream:
    """The text of one sequence.

        ... | window                  | waiting
            | the latest tokens whose | tokens whose text is still to come:
            | text is out             | half a character, or none at all

    What a token's text is depends on its neighbours, so both are decoded together, and what the
    window alone gives is taken off again.
    """

    def __init__(self, tokenizer: Tokenizer, context: TokenIds) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._window_text: str = tokenizer.decode(self._window)
        if self._window_text.endswith(REPLACEMENT):
            # Behind half a character the text would begin with the whole context's.
            self._window, self._window_text = [], ""
        self._waiting: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that a further token gives; "" in the middle of a character."""
        self._waiting.append(token_id)
        text: str = self._tokenizer.decode(self._window + self._waiting)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._window_text):
            return ""
        if text.startswith(self._window_text):
            return self._give_out(text[len(self._window_text) :], self._waiting)
        # Bytes that are no character have changed how those before them decode (tokenizers that
        # fall back to bytes join them first). What is out stays; go on from here.
        return self._give_out(self._tokenizer.decode(self._waiting), [token_id])

    def take(self, token_ids: Sequence[int]) -> str:
        """The text of further tokens: that of `step` for each of them, sooner."""
        if len(token_ids) <= 1:
            return self.step(token_ids[0]) if token_ids else ""
        waiting = [*self._waiting, *token_ids]
        text: str = self._tokenizer.decode(self._window + waiting)
        news = text[len(self._window_text) :]
        if news and REPLACEMENT not in news and text.startswith(self._window_text):
            return self._give_out(news, waiting)
        # Somewhere in here a character is not whole: look closer.
        middle = len(token_ids) // 2
        return self.take(token_ids[:middle]) + self.take(token_ids[middle:])

    def _give_out(self, text: str, window: list[int]) -> str:
        self._window, self._waiting = window, []
        self._window_text = self._tokenizer.decode(window)
        return text
