"""A chat as token ids, turn by turn and cut to length, around which lies the model's template."""

from __future__ import annotations

from scheduler.tokenization import PromptTokenizer
from wire.errors import ForebayError
from wire.ids import RequestId
from wire.messages import ChatMessage, ModelCard, Prompt, Request

_SYSTEM_MARK = "\u00a7\u00a7\u00a7"
_USER_MARK = "\u00b6\u00b6\u00b6"


class ChatFrame:
    """What the template writes before, between and after a system message and a user's message.

    A model without a template gets bare texts. Raises ValueError for a template that does not
    carry the messages over as they are.
    """

    def __init__(self, card: ModelCard) -> None:
        self._tokenizer = PromptTokenizer(card)
        self._before: list[int] = []
        self._between: list[int] = []
        self._after: list[int] = []
        if card.chat_template is None:
            return
        turns = (ChatMessage("system", _SYSTEM_MARK), ChatMessage("user", _USER_MARK))
        framed = self._ids(Prompt(messages=turns))
        system_start, system_end = _find(framed, self._text(_SYSTEM_MARK))
        user_start, user_end = _find(framed, self._text(_USER_MARK))
        self._before = framed[:system_start]
        self._between = framed[system_end:user_start]
        self._after = framed[user_end:]

    def system(self, text: str, num_tokens: int | None = None) -> list[int]:
        """All up to the user's message: `num_tokens` with the template's, if that is given."""
        return self._framed(self._before, text, self._between, num_tokens)

    def user(self, text: str, num_tokens: int | None = None) -> list[int]:
        """The user's message and what follows it, up to where the answer begins."""
        return self._framed([], text, self._after, num_tokens)

    def _framed(
        self, before: list[int], text: str, after: list[int], num_tokens: int | None
    ) -> list[int]:
        inside = self._text(text) if text else []
        if num_tokens is not None:
            room = num_tokens - len(before) - len(after)
            if not 0 < room <= len(inside):
                raise ValueError(
                    f"{num_tokens} tokens do not come out of {len(inside)} and the template's "
                    f"{len(before) + len(after)}"
                )
            inside = inside[:room]
        return [*before, *inside, *after]

    def _text(self, text: str) -> list[int]:
        ids = self._ids(Prompt(text=text))
        bos = self._tokenizer.card.bos_token_id
        return ids[1:] if self._tokenizer.card.add_bos_token and ids[0] == bos else ids

    def _ids(self, prompt: Prompt) -> list[int]:
        (ids,) = self._tokenizer.tokenize([Request(RequestId("frame"), prompt)])
        if isinstance(ids, ForebayError):
            raise ids
        return list(ids)


def _find(ids: list[int], part: list[int]) -> tuple[int, int]:
    """Where the only occurrence of `part` in `ids` starts and ends."""
    size = len(part)
    starts = [i for i in range(len(ids) - size + 1) if ids[i : i + size] == part]
    if len(starts) != 1:
        raise ValueError("the chat template changes the messages, so their length cannot be set")
    return starts[0], starts[0] + size
