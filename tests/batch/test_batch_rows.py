"""A line of the input becomes a checked row, or one helpful reason why it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
from batch_fakes import chat_row, line, text_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.batch import BatchRow, RowFailure, parse_row
from wire.messages import ChatMessage, Prompt
from wire.sampling import SamplingParams


def parsed(row: object) -> BatchRow:
    outcome = parse_row(line(row), 1)
    assert isinstance(outcome, BatchRow), outcome
    return outcome


def refused(row: object) -> RowFailure:
    outcome = parse_row(row if isinstance(row, bytes) else line(row), 7)
    assert isinstance(outcome, RowFailure), outcome
    return outcome


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def test_a_chat_row_becomes_messages_and_sampling_parameters() -> None:
    row = parsed(
        chat_row(
            "x",
            model="m",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}] * 2},
            ],
            max_completion_tokens=9,
            temperature=0,
            top_p=0.5,
            top_k=40,
            min_p=0.1,
            seed=-3,
            stop=["a", "b"],
            stop_token_ids=[2],
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            logprobs=True,
            top_logprobs=3,
            min_tokens=2,
            ignore_eos=True,
        )
    )
    assert row == BatchRow(
        row_number=1,
        custom_id="x",
        endpoint="/v1/chat/completions",
        model="m",
        prompt=Prompt(messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "Hi\nHi"))),
        sampling=SamplingParams(
            max_tokens=9,
            min_tokens=2,
            temperature=0.0,
            top_p=0.5,
            top_k=40,
            min_p=0.1,
            seed=-3,
            stop=("a", "b"),
            stop_token_ids=(2,),
            ignore_eos=True,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            repetition_penalty=1.1,
            logprobs=3,
        ),
    )


def test_a_completions_row_takes_text_or_token_ids() -> None:
    assert parsed(text_row(prompt="Once")).prompt == Prompt(text="Once")
    ids = parsed(text_row(prompt=[0, 5, 2**32 - 1])).prompt.token_ids
    assert ids is not None
    assert list(ids) == [0, 5, 2**32 - 1]


def test_defaults_are_those_of_the_endpoint() -> None:
    assert parsed(chat_row()).sampling == SamplingParams(max_tokens=None)
    assert parsed(text_row()).sampling == SamplingParams(max_tokens=16)


def test_null_means_left_out() -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ("max_tokens", "temperature", "stop", "seed", "logprobs", "top_k", "model", "tools")
    )
    assert parsed(chat_row(**nulls)) == parsed(chat_row())
    assert parsed(text_row(**nulls)) == parsed(text_row())


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_has_two_ways_of_being_off(off: int) -> None:
    assert parsed(chat_row(top_k=off)).sampling.top_k is None


def test_log_probabilities_are_asked_for_as_each_endpoint_does() -> None:
    assert parsed(chat_row(logprobs=True)).sampling.logprobs == 0
    assert parsed(chat_row(logprobs=True, top_logprobs=4)).sampling.logprobs == 4
    assert parsed(chat_row(logprobs=False, top_logprobs=0)).sampling.logprobs is None
    assert parsed(text_row(logprobs=2)).sampling.logprobs == 2


def test_a_single_stop_string_is_one_of_a_list() -> None:
    assert parsed(chat_row(stop="END")).sampling.stop == ("END",)


def test_both_names_of_the_token_limit_may_agree() -> None:
    assert parsed(chat_row(max_tokens=5, max_completion_tokens=5)).sampling.max_tokens == 5


@pytest.mark.parametrize(
    "no_op",
    [
        {"n": 1},
        {"stream": False},
        {"echo": False},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"logit_bias": None},
        {"best_of": 1},
        {"length_penalty": 1.0},
        {"chat_template": None},
        {"add_generation_prompt": True},
        {"guided_json": None},
    ],
    ids=str,
)
def test_an_unsupported_field_that_asks_for_nothing_is_let_through(no_op: dict[str, Any]) -> None:
    assert parsed(chat_row(**no_op)) == parsed(chat_row())


def test_special_tokens_are_added_to_a_plain_prompt_and_not_to_a_chat() -> None:
    assert parsed(text_row(add_special_tokens=True)) == parsed(text_row())
    assert parsed(chat_row(add_special_tokens=False)) == parsed(chat_row())
    assert refused(chat_row(add_special_tokens=True)).field == "add_special_tokens"


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    # (body, field at fault, part of what is said)
    ({"temperature": "hot"}, "temperature", 'is "hot"; it must be a number'),
    ({"temperature": True}, "temperature", "is true; it must be a number"),
    ({"temperature": float("nan")}, "temperature", "is nan"),
    ({"temperature": float("inf")}, "temperature", "is inf"),
    ({"temperature": 10**30}, "temperature", "far too large"),
    ({"temperature": -1}, "temperature", "is -1.0; it must be 0.0 to 100.0"),
    ({"top_p": 0}, "top_p", "above 0, up to 1"),
    ({"top_k": -2}, "top_k", "is -2"),
    ({"top_k": 1.5}, "top_k", "is 1.5; it must be a whole number"),
    ({"min_p": 2}, "min_p", "is 2.0"),
    ({"max_tokens": 0}, "max_tokens", "is 0; it must be 1 to"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    ({"max_tokens": 10**100}, "max_tokens", "(101 digits); it is far too large"),
    ({"max_tokens": "10"}, "max_tokens", 'is "10"; it must be a whole number'),
    ({"max_tokens": True}, "max_tokens", "is true; it must be a whole number"),
    ({"max_tokens": 16.0}, "max_tokens", "is 16.0; it must be a whole number"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "give one of them"),
    ({"max_tokens": 1, "min_tokens": 2}, "min_tokens", "0 to max_tokens"),
    ({"seed": 2**63}, "seed", "it must be"),
    ({"stop": 5}, "stop", "is 5; it must be a string or a list of strings"),
    ({"stop": ["a", None]}, "stop[1]", "is null; it must be a string"),
    ({"stop": ""}, "stop", "length of a stop string is 0"),
    ({"stop": ["x"] * 17}, "stop", "number of stop strings is 17"),
    ({"stop_token_ids": 2}, "stop_token_ids", "is 2; it must be a list"),
    ({"stop_token_ids": [2, True]}, "stop_token_ids[1]", "is true"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "is -1"),
    ({"ignore_eos": 1}, "ignore_eos", "is 1; it must be true or false"),
    ({"presence_penalty": 3}, "presence_penalty", "is 3.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"logprobs": 1}, "logprobs", "it must be true or false"),
    ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"model": ""}, "model", "give a name"),
    ({"model": 5}, "model", "must be a string"),
    ({"n": 2}, "n", "is 2, which is not supported; write one row for each answer"),
    ({"n": True}, "n", "is true, which is not supported"),
    ({"stream": True}, "stream", "not supported"),
    ({"tools": [{}]}, "tools", "is a list of 1, which is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"user": "u"}, "user", "not supported; remove it"),
    ({"guided_regex": "a+"}, "guided_regex", "not supported"),
    ({"structured_outputs": {}}, "structured_outputs", "not supported"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"max_new_tokens": 5}, "max_new_tokens", "is not a known field"),
    ({"zzz": 5}, "zzz", "is not a known field; remove it"),
    ({"x" * 10_000: 5}, '"' + "x" * 60 + '"... (10000 characters)', "not a known field"),
    ({"\ud800": 5}, '"\\ud800"', "not a known field"),
]
BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "is empty"),
    ({"messages": None}, "messages", "is null; it must be a list"),
    ({"messages": "Hi"}, "messages", 'is "Hi"; it must be a list'),
    ({"messages": ["Hi"]}, "messages[0]", "it must be an object"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "usr", "content": ""}]}, "messages[0].role", "one of system"),
    ({"messages": [{"role": 1, "content": ""}]}, "messages[0].role", "must be a string"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": None}]},
        "messages[1].content",
        "is null; it must be a string or a list of text parts",
    ),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        'is "image_url"; only "text" is supported',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "is missing",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "b": 1}]}]},
        "messages[0].content[0].b",
        "not a known field",
    ),
    (
        {"messages": [{"role": "user", "content": "\ud83d!"}]},
        "messages[0].content",
        "lone surrogate \\ud83d at character 1",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "not supported",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "contents": "b"}]},
        "messages[0].contents",
        "did you mean content?",
    ),
    ({"prompt": "a"}, "prompt", "belongs to /v1/completions"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": []}, "prompt", "is empty"),
    ({"prompt": None}, "prompt", "is null"),
    ({"prompt": ["a", "b"]}, "prompt", "is a list of 2 prompts; one row holds one prompt"),
    ({"prompt": [[1], [2]]}, "prompt", "one row holds one prompt"),
    ({"prompt": [1, -1]}, "prompt[1]", "is -1; a token id is"),
    ({"prompt": [1, 2**32]}, "prompt[1]", "a token id is"),
    ({"prompt": [1, True]}, "prompt[1]", "is true"),
    ({"prompt": [1, 1.0]}, "prompt[1]", "is 1.0"),
    ({"prompt": [1, "a"]}, "prompt[1]", 'is "a"'),
    ({"logprobs": True}, "logprobs", "is true; it must be a whole number"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21"),
    ({"top_logprobs": 2}, "top_logprobs", "takes the number as logprobs"),
    ({"messages": []}, "messages", "belongs to /v1/chat/completions"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"echo": True}, "echo", "not supported"),
]
BAD_ENVELOPES: list[tuple[object, str | None, str]] = [
    (without(chat_row(), "custom_id"), "custom_id", "is missing"),
    (chat_row("") | {"custom_id": 7}, "custom_id", "is 7; it must be a string"),
    (chat_row(""), "custom_id", "is empty"),
    (chat_row("x" * 513), "custom_id", "at most 512"),
    (chat_row("\udc00"), "custom_id", "lone surrogate"),
    (without(chat_row(), "method"), "method", "is missing"),
    (chat_row() | {"method": "GET"}, "method", 'is "GET"; it must be "POST"'),
    (without(chat_row(), "url"), "url", "is missing"),
    (chat_row() | {"url": "/v1/embeddings"}, "url", 'is "/v1/embeddings"; it must be /v1/chat'),
    (chat_row() | {"url": ["/v1/completions"]}, "url", "is a list of 1"),
    (without(chat_row(), "body"), "body", "is missing"),
    (chat_row() | {"body": []}, "body", "is an empty list; it must be an object"),
    (chat_row() | {"boddy": {}}, "boddy", "did you mean body?"),
    ([], None, "is an empty list; it must be an object"),
    (5, None, "is 5; it must be an object"),
    (b"{", None, "not JSON at character 2"),
    (b"{} {}", None, "not JSON at character 4: Extra data"),
    (b"{'a': 1}", None, "not JSON at character 2"),
    (b'{"a": "\t"}', None, "not JSON"),
    (b'{"a": 1, "a": 2}', "a", "is given twice"),
    (b'{"a": ' + b"[" * 100_000, None, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", None, "thousands of digits"),
    (b'{"a": "\xff"}', None, "not UTF-8 at byte 8 (0xff)"),
    (json.dumps(chat_row()).encode("utf-16"), None, "not UTF-8 at byte 1"),
]


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        *((chat_row(**body), field, said) for body, field, said in BAD_BODIES),
        *((chat_row(**body), field, said) for body, field, said in BAD_CHATS),
        *((text_row(**body), field, said) for body, field, said in BAD_COMPLETIONS),
        *BAD_ENVELOPES,
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, (dict, bytes)) else "",
)
def test_a_bad_row_is_refused_with_field_value_and_remedy(
    row: object, field: str | None, said: str
) -> None:
    failure = refused(row)
    assert failure.field == field
    assert said in failure.message
    assert failure.code == "invalid_request"
    if field is not None:
        assert field in failure.message or "stop string" in failure.message
    shown = str(failure)
    assert shown.startswith("row 7")
    assert len(shown) < 400
    assert shown.isprintable()


def test_a_failure_names_the_custom_id_where_the_line_gives_one() -> None:
    assert refused(chat_row("seven", n=2)).custom_id == "seven"
    assert refused(chat_row("seven") | {"method": "GET"}).custom_id == "seven"
    assert refused(b'{"custom_id": "seven", "a": 1, "a": 2}').custom_id == "seven"
    assert refused(b'{"custom_id": "seven", "body": "\xff"}').custom_id == "seven"
    assert refused(b'{"custom_id": "s\xffven"}').custom_id is None
    assert refused(b'{"custom_id": "seven"').custom_id is None


def test_a_long_value_is_shown_shortened() -> None:
    failure = refused(chat_row(temperature="secret " * 1000))
    assert "(7000 characters)" in failure.message
    assert len(failure.message) < 150


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
body_fields = st.sampled_from(
    [
        "messages",
        "prompt",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_logprobs",
        "n",
        "seed",
        "tools",
        "response_format",
        "model",
    ]
)


# Hypothesis builds its tables of characters within the first example.
generously = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@generously
@given(st.binary())
def test_no_bytes_crash_the_parser(content: bytes) -> None:
    outcome = parse_row(content, 1)
    assert isinstance(outcome, (BatchRow, RowFailure))
    str(outcome)


@generously
@given(
    st.sampled_from([chat_row(), text_row()]), st.dictionaries(body_fields, json_values, max_size=4)
)
def test_no_json_values_crash_the_parser(row: dict[str, Any], fields: dict[str, Any]) -> None:
    outcome = parse_row(line({**row, "body": row["body"] | fields}), 1)
    if isinstance(outcome, RowFailure):
        assert outcome.field
        assert str(outcome).isprintable()


@generously
@given(st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), json_values))
def test_no_envelope_crashes_the_parser(row: dict[str, Any]) -> None:
    assert isinstance(parse_row(line(row), 1), RowFailure)
