"""A row's `body`: the fields of OpenAI's endpoints, and vLLM's further ones, as a request's parts.

Null means the same as leaving the field out. Ranges are SamplingParams' business; here are types,
OpenAI's spellings, and the defaults that differ between the endpoints.
"""

from __future__ import annotations

from typing import Any

from producer.batch import checks
from producer.batch.checks import shorten
from producer.batch.fields import CHAT, Endpoint, refuse_other_fields
from producer.batch.prompt import parse_messages, parse_prompt
from wire.errors import InvalidRequest
from wire.messages import Prompt
from wire.sampling import SamplingParams

_COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default; chat has none, and runs up to the context
_MAX_MODEL_CHARS = 256

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_INTEGERS = ("min_tokens", "seed")


def parse_body(
    endpoint: Endpoint, body: dict[str, object]
) -> tuple[str | None, Prompt, SamplingParams]:
    """The model's name if one is given, the prompt, and how to sample.

    Raises InvalidRequest whose `field` is relative to the body (`"messages[1].content"`).
    """
    refuse_other_fields(endpoint, body)
    model = _model(body)
    if endpoint == CHAT:
        prompt = parse_messages(checks.required(body, "messages", "messages"))
    else:
        prompt = parse_prompt(checks.required(body, "prompt", "prompt"))
    return model, prompt, _sampling(endpoint, body)


def _model(body: dict[str, object]) -> str | None:
    if body.get("model") is None:
        return None
    model = checks.text(body["model"], "model")
    if not 0 < len(model) <= _MAX_MODEL_CHARS:
        raise InvalidRequest(
            f"model is {shorten(model)}; give a name of at most {_MAX_MODEL_CHARS} characters, "
            f"or leave it out",
            field="model",
        )
    return model


def _sampling(endpoint: Endpoint, body: dict[str, object]) -> SamplingParams:
    given = {name: value for name, value in body.items() if value is not None}
    params: dict[str, Any] = {}
    for name in _NUMBERS:
        if name in given:
            params[name] = checks.number(given[name], name)
    for name in _INTEGERS:
        if name in given:
            params[name] = checks.integer(given[name], name)
    if "ignore_eos" in given:
        params["ignore_eos"] = checks.boolean(given["ignore_eos"], "ignore_eos")
    if "top_k" in given:
        top_k = checks.integer(given["top_k"], "top_k")
        params["top_k"] = None if top_k in (0, -1) else top_k
    if "stop" in given:
        params["stop"] = _stop(given["stop"])
    if "stop_token_ids" in given:
        params["stop_token_ids"] = tuple(
            checks.integer(token_id, f"stop_token_ids[{i}]")
            for i, token_id in enumerate(checks.array(given["stop_token_ids"], "stop_token_ids"))
        )
    params["max_tokens"], max_tokens_name = _max_tokens(endpoint, given)
    params["logprobs"], logprobs_name = _logprobs(endpoint, given)
    try:
        return SamplingParams(**params)
    except InvalidRequest as error:
        raise _respelled(
            error, {"max_tokens": max_tokens_name, "logprobs": logprobs_name}
        ) from None


def _stop(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(checks.text(stop, f"stop[{i}]") for i, stop in enumerate(value))
    if not isinstance(value, str):
        raise InvalidRequest(
            f"stop is {shorten(value)}; it must be a string or a list of strings", field="stop"
        )
    return (checks.text(value, "stop"),)


def _max_tokens(endpoint: Endpoint, given: dict[str, object]) -> tuple[int | None, str]:
    """The limit, and the name under which the row gave it."""
    limits = {
        name: checks.integer(given[name], name)
        for name in ("max_tokens", "max_completion_tokens")
        if name in given
    }
    if len(set(limits.values())) > 1:
        raise InvalidRequest(
            f"max_completion_tokens is {limits['max_completion_tokens']} and max_tokens is "
            f"{limits['max_tokens']}; they mean the same: give one of them",
            field="max_completion_tokens",
        )
    for name, limit in limits.items():
        return limit, name
    return (None if endpoint == CHAT else _COMPLETIONS_MAX_TOKENS), "max_tokens"


def _logprobs(endpoint: Endpoint, given: dict[str, object]) -> tuple[int | None, str]:
    """How many alternatives per token (None: no log probabilities), and the name that said so."""
    if endpoint != CHAT:
        wanted = given.get("logprobs")
        return (None if wanted is None else checks.integer(wanted, "logprobs")), "logprobs"
    enabled = checks.boolean(given.get("logprobs", False), "logprobs")
    num_top = checks.integer(given.get("top_logprobs", 0), "top_logprobs")
    if num_top and not enabled:
        raise InvalidRequest(
            f"top_logprobs is {num_top} without logprobs; set logprobs to true as well",
            field="top_logprobs",
        )
    return (num_top if enabled else None), "top_logprobs"


def _respelled(error: InvalidRequest, names: dict[str, str]) -> InvalidRequest:
    """`error` in the row's own words, where it called a field by another name."""
    name = names.get(error.field or "")
    if name is None or name == error.field:
        return error
    return InvalidRequest(str(error).replace(error.field or "", name, 1), field=name)
