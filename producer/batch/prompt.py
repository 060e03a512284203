"""The prompt of a row: chat messages, a text, or token ids."""

from __future__ import annotations

from producer.batch import checks
from producer.batch.checks import shorten
from producer.batch.fields import unknown_field
from wire.errors import InvalidRequest
from wire.ids import token_ids
from wire.messages import ChatMessage, Prompt

_ROLES = ("system", "developer", "user", "assistant")
_MESSAGE_FIELDS = frozenset({"role", "content"})
_UNSUPPORTED_MESSAGE_FIELDS = frozenset(
    {
        "audio",
        "function_call",
        "name",
        "reasoning",
        "reasoning_content",
        "refusal",
        "tool_call_id",
        "tool_calls",
    }
)


def parse_messages(value: object) -> Prompt:
    """A chat prompt from the body's `messages`. Raises InvalidRequest naming the part at fault."""
    messages = checks.array(value, "messages")
    if not messages:
        raise InvalidRequest("messages is empty; give at least one message", field="messages")
    return Prompt(messages=tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages)))


def parse_prompt(value: object) -> Prompt:
    """A text or token-id prompt from the body's `prompt`. Raises InvalidRequest."""
    if isinstance(value, str):
        if not value:
            raise _empty_prompt()
        return Prompt(text=checks.text(value, "prompt"))
    if not isinstance(value, list):
        raise InvalidRequest(
            f"prompt is {shorten(value)}; it must be a string or a list of token ids",
            field="prompt",
        )
    if not value:
        raise _empty_prompt()
    if isinstance(value[0], (str, list)):
        raise InvalidRequest(
            f"prompt is {shorten(value)} prompts; one row holds one prompt: write a row for each",
            field="prompt",
        )
    return _token_prompt(value)


def _empty_prompt() -> InvalidRequest:
    return InvalidRequest(
        "prompt is empty; give the model a text or token ids to continue", field="prompt"
    )


def _token_prompt(ids: list[object]) -> Prompt:
    try:
        # array() would take True for 1.
        if set(map(type, ids)) == {int}:
            return Prompt(token_ids=token_ids(ids))  # type: ignore[arg-type]
    except OverflowError:
        pass
    index, value = next(
        (i, v) for i, v in enumerate(ids) if type(v) is not int or not 0 <= v < 2**32
    )
    raise InvalidRequest(
        f"prompt[{index}] is {shorten(value)}; a token id is a whole number from 0 to {2**32 - 1}",
        field=f"prompt[{index}]",
    )


def _message(value: object, field: str) -> ChatMessage:
    message = checks.json_object(value, field)
    for key, extra in message.items():
        if key not in _MESSAGE_FIELDS:
            _refuse_message_field(key, extra, field)
    role = checks.text(checks.required(message, "role", f"{field}.role"), f"{field}.role")
    if role not in _ROLES:
        raise InvalidRequest(
            f"{field}.role is {shorten(role)}; it must be one of {', '.join(_ROLES)}",
            field=f"{field}.role",
        )
    content = checks.required(message, "content", f"{field}.content")
    return ChatMessage(role=role, content=_content(content, f"{field}.content"))


def _refuse_message_field(key: str, value: object, field: str) -> None:
    if key not in _UNSUPPORTED_MESSAGE_FIELDS:
        raise unknown_field(key, _MESSAGE_FIELDS, prefix=f"{field}.")
    if value is None or value == []:
        return
    raise InvalidRequest(
        f"{field}.{key} is {shorten(value)}, which is not supported; remove it",
        field=f"{field}.{key}",
    )


def _content(value: object, field: str) -> str:
    if isinstance(value, str):
        return checks.text(value, field)
    if not isinstance(value, list):
        raise InvalidRequest(
            f"{field} is {shorten(value)}; it must be a string or a list of text parts",
            field=field,
        )
    if not value:
        raise InvalidRequest(f"{field} is an empty list; give it a text part", field=field)
    # Parts are lines of one text, as in vLLM.
    return "\n".join(_text_part(part, f"{field}[{i}]") for i, part in enumerate(value))


def _text_part(value: object, field: str) -> str:
    part = checks.json_object(value, field)
    kind = checks.required(part, "type", f"{field}.type")
    if kind != "text":
        raise InvalidRequest(
            f'{field}.type is {shorten(kind)}; only "text" is supported', field=f"{field}.type"
        )
    for key, extra in part.items():
        if key not in ("type", "text") and extra is not None:
            raise unknown_field(key, frozenset({"type", "text"}), prefix=f"{field}.")
    return checks.text(checks.required(part, "text", f"{field}.text"), f"{field}.text")
