"""From a request's prompt to token ids, with the tokenizer and chat template of its model.

Chat templates are programs that come with a model: they run in jinja2's sandbox, which keeps them
from everything but the values given to them. It does not bound their time: a template that counts
to infinity stops the scheduler, so serve models from whom you trust that far. The template's
interface (variables, helper functions) is the one that Hugging Face documents for chat templates.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from wire.errors import ForebayError, InvalidRequest, ModelError, RequestTooLong
from wire.ids import TokenIds, token_ids
from wire.messages import ChatMessage, ModelCard, Request


class PromptTokenizer:
    """Tokenizes the prompts of one model; usable from any one thread at a time.

    Raises ModelError for a card whose tokenizer or chat template cannot be used.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
            self._template = (
                None if card.chat_template is None else environment.from_string(card.chat_template)
            )
        except (ValueError, TemplateError) as error:
            raise ModelError(f"the model card of {card.name} cannot be used: {error}") from error

    @property
    def card(self) -> ModelCard:
        """The model whose prompts these are."""
        return self._card

    def tokenize(self, requests: Sequence[Request]) -> list[TokenIds | ForebayError]:
        """Token ids for each request, or the reason why it cannot be served.

        Checked here: that the ids are the model's, and that the prompt and at least one new token
        (all of them, where `max_tokens` is given) fit the context.
        """
        outcomes: list[TokenIds | ForebayError] = []
        for request in requests:
            try:
                ids = self._prompt_ids(request)
                self._check(request, ids)
                outcomes.append(ids)
            except ForebayError as error:
                outcomes.append(error)
        return outcomes

    def _prompt_ids(self, request: Request) -> TokenIds:
        prompt = request.prompt
        if prompt.token_ids is not None:
            for token_id in prompt.token_ids:
                if token_id >= self._card.vocab_size:
                    raise InvalidRequest(
                        f"prompt holds token id {token_id}; {self._card.name} has ids "
                        f"0 to {self._card.vocab_size - 1}",
                        field="prompt",
                    )
            return prompt.token_ids
        if prompt.messages is not None:
            # The template writes special tokens itself.
            return self._encode(self._render(prompt.messages))
        assert prompt.text is not None
        ids = self._encode(prompt.text)
        if self._card.add_bos_token and self._card.bos_token_id is not None:
            ids.insert(0, self._card.bos_token_id)
        return ids

    def _encode(self, text: str) -> TokenIds:
        return token_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _render(self, messages: tuple[ChatMessage, ...]) -> str:
        if self._template is None:
            raise InvalidRequest(
                f"model {self._card.name} has no chat template; send a prompt instead of messages",
                field="messages",
            )
        try:
            return self._template.render(
                messages=[{"role": turn.role, "content": turn.content} for turn in messages],
                add_generation_prompt=True,
                bos_token=self._card.bos_token or "",
                eos_token=self._card.eos_token or "",
            )
        except Exception as error:  # it is a program: any error can come out of it
            raise InvalidRequest(
                f"messages do not fit the chat template of {self._card.name}: {error}",
                field="messages",
            ) from error

    def _check(self, request: Request, ids: TokenIds) -> None:
        limit, max_tokens = self._card.max_model_len, request.sampling.max_tokens
        if not ids:
            raise InvalidRequest("the prompt has no tokens; give it at least one", field="prompt")
        if len(ids) >= limit:
            raise RequestTooLong(
                f"the prompt has {len(ids)} tokens; {self._card.name} takes {limit} with the "
                "output, so at most "
                f"{limit - 1} of prompt: shorten it",
                field="prompt",
            )
        if max_tokens is not None and len(ids) + max_tokens > limit:
            raise RequestTooLong(
                f"max_tokens is {max_tokens}, and with the prompt's {len(ids)} tokens exceeds the "
                f"{limit} of {self._card.name}; at most {limit - len(ids)} fit",
                field="max_tokens",
            )


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML, which would change prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)
