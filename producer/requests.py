"""Requests from what callers give, checked as far as it goes without the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from wire.codec import MAX_MESSAGE_BYTES, encode
from wire.errors import InvalidRequest
from wire.ids import RequestId, token_ids
from wire.keys import check_request_id
from wire.messages import PRIORITIES, ChatMessage, Prompt, Request
from wire.scripts import Submission

MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES // 4

Message: TypeAlias = ChatMessage | Mapping[str, str]


def new_request_id() -> RequestId:
    """A random id."""
    return RequestId(os.urandom(12).hex())


def make_prompt(prompt: str | Sequence[int] | None, messages: Sequence[Message] | None) -> Prompt:
    """A prompt from what callers give. Raises InvalidRequest, naming the field."""
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either a prompt or messages", field="prompt")
    if messages is not None:
        if not messages:
            raise InvalidRequest("messages is empty; give at least one", field="messages")
        return Prompt(messages=tuple(_chat_message(i, m) for i, m in enumerate(messages)))
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("prompt is empty; give at least one character", field="prompt")
        return Prompt(text=prompt)
    assert prompt is not None
    if not prompt:
        raise InvalidRequest("prompt is empty; give at least one token id", field="prompt")
    try:
        return Prompt(token_ids=token_ids(prompt))
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(f"prompt is no list of token ids: {error}", field="prompt") from error


def _chat_message(index: int, message: Message) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    fields = dict(message)
    if fields.keys() != {"role", "content"} or not all(
        isinstance(value, str) for value in fields.values()
    ):
        raise InvalidRequest(
            f"messages[{index}] must have a role and a content, both strings, and nothing else",
            field=f"messages[{index}]",
        )
    return ChatMessage(fields["role"], fields["content"])


def make_submission(request: Request) -> Submission:
    """A request as it goes to the server. Raises InvalidRequest for what can be seen from here."""
    timeout_s = request.timeout_s
    if timeout_s is not None and not 0 < timeout_s < 10**9:
        raise InvalidRequest(
            f"timeout_s is {timeout_s}; it must be above 0 and below 1e9", field="timeout_s"
        )
    if request.priority not in PRIORITIES:
        raise InvalidRequest(
            f"priority is {request.priority!r}; it must be one of {', '.join(PRIORITIES)}",
            field="priority",
        )
    try:
        message = encode(request)
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "the request holds half of a surrogate pair, which is no character: "
            f"{error.object[error.start : error.end]!a} at {error.start} of {len(error.object)}",
        ) from error
    if len(message) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"the request has {len(message)} bytes; at most {MAX_REQUEST_BYTES} are taken",
            field="prompt",
        )
    return Submission(
        request_id=check_request_id(request.request_id),
        priority=request.priority,
        stream=request.stream,
        timeout_ms=None if timeout_s is None else max(1, int(timeout_s * 1000)),
        message=message,
    )
