"""Rows out: OpenAI's batch output objects.

    {"id": "batch_req_...", "custom_id": "a",
     "response": {"status_code": 200, "request_id": "...", "body": {a completion object}},
     "error": null}

A row that failed has `response` null and `error` set: no HTTP call stands behind a batch run, and
OpenAI documents `error` as the place for what failed otherwise. So exactly one of the two is set,
and both of the usual tests, `error is None` and `response.status_code == 200`, work. `error` has
the four fields of OpenAI's batch errors: `code`, `message`, `param` (the field at fault) and
`line` (the row's line in the input).

What a row had generated when it was cancelled, expired or failed is not lost: such a row has one
more key, `partial`, a completion object like that of an answer, whose `finish_reason` is null.
It is not in `response`, where programs would take it for an answer, and rows that had generated
nothing do not have it.

Completion objects are OpenAI's, with vLLM's `stop_reason` in each choice. A log probability below
-9999 is written as -9999, OpenAI's word for "very unlikely": JSON has no infinity.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from producer.batch.fields import CHAT, Endpoint
from producer.batch.row import RowFailure
from wire.ids import RequestId
from wire.messages import Result, TokenLogprob, TopLogprob

JsonObject: TypeAlias = dict[str, Any]

_LEAST_LOGPROB = -9999.0


def encode_line(row: JsonObject) -> bytes:
    """One line of JSONL, with its line break."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate becomes its JSON escape.
    return line.encode(errors="backslashreplace") + b"\n"


def answer_row(custom_id: str, endpoint: Endpoint, result: Result) -> JsonObject:
    """The output object of a request that is done."""
    body = completion(endpoint, result)
    response = {"status_code": 200, "request_id": result.request_id, "body": body}
    return _row(result.request_id, custom_id, response, None)


def partial_completion(endpoint: Endpoint, result: Result) -> JsonObject | None:
    """What a request had generated that ended without an answer; None if nothing."""
    return completion(endpoint, result) if result.token_ids else None


def completion(endpoint: Endpoint, result: Result) -> JsonObject:
    """OpenAI's completion object of the row's endpoint."""
    return _chat_completion(result) if endpoint == CHAT else _text_completion(result)


def failure_row(
    request_id: RequestId, failure: RowFailure, partial: JsonObject | None = None
) -> JsonObject:
    """The output object of a row that has no answer; `partial` is what it got instead, if any."""
    error = {
        "code": failure.code,
        "message": failure.message,
        "param": failure.field,
        "line": failure.row_number,
    }
    row = _row(request_id, failure.custom_id, None, error)
    return row if partial is None else {**row, "partial": partial}


def _row(
    request_id: RequestId,
    custom_id: str | None,
    response: JsonObject | None,
    error: JsonObject | None,
) -> JsonObject:
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


def _chat_completion(result: Result) -> JsonObject:
    logprobs = result.logprobs
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": result.text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": [*map(_chat_logprob, logprobs)]},
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
    }
    return _completion("chatcmpl", "chat.completion", choice, result)


def _text_completion(result: Result) -> JsonObject:
    logprobs = result.logprobs
    choice = {
        "index": 0,
        "text": result.text,
        "logprobs": None if logprobs is None else _text_logprobs(logprobs),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
    }
    return _completion("cmpl", "text_completion", choice, result)


def _completion(prefix: str, kind: str, choice: JsonObject, result: Result) -> JsonObject:
    num_completion_tokens = len(result.token_ids)
    return {
        "id": f"{prefix}-{result.request_id}",
        "object": kind,
        "created": result.submitted_ms // 1000,
        "model": result.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": result.num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": result.num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": result.num_cached_tokens},
        },
    }


def _chat_logprob(token: TokenLogprob) -> JsonObject:
    top = [_chat_alternative(alternative) for alternative in token.top]
    return {**_chat_alternative(token), "top_logprobs": top}


def _chat_alternative(token: TokenLogprob | TopLogprob) -> JsonObject:
    return {
        "token": token.token,
        "logprob": _finite(token.logprob),
        "bytes": list(token.token.encode(errors="replace")),
    }


def _text_logprobs(tokens: tuple[TokenLogprob, ...]) -> JsonObject:
    offsets: list[int] = []
    offset = 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and the chosen one, whose text may equal another's: the best stays."""
    alternatives: tuple[TokenLogprob | TopLogprob, ...] = (*token.top, token)
    by_text: dict[str, float] = {}
    for alternative in alternatives:
        by_text.setdefault(alternative.token, _finite(alternative.logprob))
    return by_text


def _finite(logprob: float) -> float:
    # Written so that NaN is replaced too.
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
