"""Output rows are OpenAI's batch output objects, valid JSON whatever the model said."""

from __future__ import annotations

import json
from dataclasses import replace

from batch_fakes import answer

from producer.batch.output import answer_row, encode_line, failure_row, partial_completion
from producer.batch.row import RowFailure
from wire.ids import RequestId
from wire.messages import Prompt, Request, Result, TokenLogprob, TopLogprob

REQUEST_ID = RequestId("run-1")
DONE = answer(Request(REQUEST_ID, Prompt(text="Once")))
TOKENS = (
    TokenLogprob(7, "an", -0.5, (TopLogprob(7, "an", -0.5), TopLogprob(8, "a", -1.5))),
    TokenLogprob(9, " é", -3.0, (TopLogprob(5, " x", -0.1), TopLogprob(6, " x", -0.2))),
    TokenLogprob(4, ".", float("-inf")),
)


def written(result: Result, endpoint: str) -> dict[str, object]:
    chat = endpoint == "/v1/chat/completions"
    row = answer_row("a", "/v1/chat/completions" if chat else "/v1/completions", result)
    line = encode_line(row)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    decoded: dict[str, object] = json.loads(line, parse_constant=lambda name: 1 / 0)
    return decoded


def test_a_chat_answer() -> None:
    assert written(replace(DONE, stop_reason="END"), "/v1/chat/completions") == {
        "id": "batch_req_run-1",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "run-1",
            "body": {
                "id": "chatcmpl-run-1",
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "fake",
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": "an answer",
                            "refusal": None,
                        },
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": "END",
                    }
                ],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 3,
                    "total_tokens": 8,
                    "prompt_tokens_details": {"cached_tokens": 4},
                },
            },
        },
        "error": None,
    }


def test_a_text_answer() -> None:
    row = answer_row("a", "/v1/completions", DONE)
    body = row["response"]["body"]
    assert body["id"] == "cmpl-run-1"
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "an answer"
    assert "message" not in body["choices"][0]


def test_chat_log_probabilities_carry_bytes_and_alternatives() -> None:
    row = answer_row("a", "/v1/chat/completions", replace(DONE, logprobs=TOKENS))
    first, second, third = row["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "an",
        "logprob": -0.5,
        "bytes": [97, 110],
        "top_logprobs": [
            {"token": "an", "logprob": -0.5, "bytes": [97, 110]},
            {"token": "a", "logprob": -1.5, "bytes": [97]},
        ],
    }
    assert second["bytes"] == [32, 195, 169]
    assert third == {"token": ".", "logprob": -9999.0, "bytes": [46], "top_logprobs": []}


def test_text_log_probabilities_are_columns() -> None:
    row = answer_row("a", "/v1/completions", replace(DONE, logprobs=TOKENS))
    assert row["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["an", " é", "."],
        "token_logprobs": [-0.5, -3.0, -9999.0],
        "top_logprobs": [
            {"an": -0.5, "a": -1.5},
            {" x": -0.1, " é": -3.0},  # of two tokens with one text, the more likely
            {".": -9999.0},
        ],
        "text_offset": [0, 2, 4],
    }


def test_a_failure_has_the_fields_of_openais_batch_errors() -> None:
    failure = RowFailure(3, "a", "invalid_request", "n is 2", "n")
    assert failure_row(REQUEST_ID, failure) == {
        "id": "batch_req_run-1",
        "custom_id": "a",
        "response": None,
        "error": {"code": "invalid_request", "message": "n is 2", "param": "n", "line": 3},
    }


def test_a_row_that_ended_half_way_keeps_what_it_had_generated() -> None:
    half = replace(DONE, state="expired", finish_reason=None, text="an ans")
    partial = partial_completion("/v1/chat/completions", half)
    row = failure_row(REQUEST_ID, RowFailure(3, "a", "expired", "too late"), partial)
    assert row["response"] is None
    assert row["error"]["code"] == "expired"
    assert row["partial"]["object"] == "chat.completion"
    assert row["partial"]["choices"][0]["message"]["content"] == "an ans"
    assert row["partial"]["choices"][0]["finish_reason"] is None
    assert row["partial"]["usage"]["completion_tokens"] == 3


def test_a_row_that_had_generated_nothing_has_no_partial_answer() -> None:
    nothing = Result(REQUEST_ID, "cancelled")
    assert partial_completion("/v1/completions", nothing) is None


def test_every_text_is_written_as_valid_json() -> None:
    text = "two\nlines, \u2028, \x00, 漢字, \ud83d"
    line = encode_line(answer_row("a", "/v1/completions", replace(DONE, text=text)))
    assert json.loads(line)["response"]["body"]["choices"][0]["text"] == text
    assert "漢字".encode() in line
    assert line.count(b"\n") == 1
