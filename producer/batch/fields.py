"""Which fields a body may have, and what becomes of the others: each is refused by its name.

A field that would change the answer and that Forebay does not have is never dropped silently. Its
no-op value (null, or the value that means "as usual") asks for nothing, so it is let through:
generic clients send `"n": 1, "stream": false` with every request.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal, TypeAlias

from producer.batch.checks import path, shorten
from wire.errors import InvalidRequest

Endpoint: TypeAlias = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"

_COMMON = frozenset(
    {
        "model",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logprobs",
    }
)
SUPPORTED: dict[Endpoint, frozenset[str]] = {
    CHAT: _COMMON | {"messages", "top_logprobs"},
    COMPLETIONS: _COMMON | {"prompt"},
}

_NOTHING: tuple[object, ...] = ()
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # OpenAI's. The values are those that ask for nothing, besides null.
    "audio": _NOTHING,
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": _NOTHING,
    "prompt_cache_key": _NOTHING,
    "reasoning_effort": _NOTHING,
    "response_format": ({"type": "text"},),
    "safety_identifier": _NOTHING,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream": (False,),
    "stream_options": _NOTHING,
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": ("",),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
    # vLLM's.
    "add_generation_prompt": (True,),
    "allowed_token_ids": _NOTHING,
    "bad_words": ([],),
    "cache_salt": _NOTHING,
    "chat_template": _NOTHING,
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": _NOTHING,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": _NOTHING,
    "prompt_logprobs": _NOTHING,
    "request_id": _NOTHING,
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": _NOTHING,
    "structured_outputs": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_NO_OPS: dict[Endpoint, dict[str, tuple[object, ...]]] = {
    # A chat template writes the special tokens itself; a plain prompt has them added.
    CHAT: _UNSUPPORTED | {"add_special_tokens": (False,)},
    COMPLETIONS: _UNSUPPORTED | {"add_special_tokens": (True,), "top_logprobs": (0,)},
}


def refuse_other_fields(endpoint: Endpoint, body: Mapping[str, object]) -> None:
    """Raise InvalidRequest, naming the field, unless all of `body` is supported or a no-op."""
    supported = SUPPORTED[endpoint]
    for name, value in body.items():
        if name not in supported:
            _refuse_unless_no_op(endpoint, name, value)


def unknown_field(name: str, known: frozenset[str], *, prefix: str = "") -> InvalidRequest:
    """The error for a field that nobody knows, with the known one that it resembles."""
    field = f"{prefix}{path(name)}"
    return InvalidRequest(f"{field} is not a known field; {_remedy(name, known)}", field=field)


def _refuse_unless_no_op(endpoint: Endpoint, name: str, value: object) -> None:
    no_ops = _NO_OPS[endpoint].get(name)
    if no_ops is not None:
        if value is None or any(_same(value, no_op) for no_op in no_ops):
            return
        raise InvalidRequest(
            f"{name} is {shorten(value)}, which is not supported; {_instead(endpoint, name)}",
            field=name,
        )
    other: Endpoint = COMPLETIONS if endpoint == CHAT else CHAT
    if name in SUPPORTED[other]:
        raise InvalidRequest(
            f"{name} belongs to {other}, and the row's url is {endpoint}; change one of the two",
            field=name,
        )
    raise unknown_field(name, SUPPORTED[endpoint] | _NO_OPS[endpoint].keys())


def _instead(endpoint: Endpoint, name: str) -> str:
    if name == "top_logprobs":
        return f"{endpoint} takes the number as logprobs"
    if name in ("n", "best_of"):
        return "write one row for each answer"
    return "remove it"


def _remedy(name: str, known: frozenset[str]) -> str:
    # A long name is no typo, and comparing it would take time.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) if len(name) <= 64 else []
    return f"did you mean {close[0]}?" if close else "remove it"


def _same(value: object, no_op: object) -> bool:
    # Python holds True equal to 1; JSON does not.
    return value == no_op and isinstance(value, bool) == isinstance(no_op, bool)
