"""The bytes of every message at wire version 1.

They are what a process of another release reads: whoever changes them on purpose raises
`WIRE_VERSION` and adds a table, rather than editing this one.
"""

from __future__ import annotations

import dataclasses

import pytest

import wire.messages
from wire.codec import WIRE_VERSION, decode, encode
from wire.ids import GroupId, RequestId, token_ids
from wire.messages import (
    Assignment,
    ChatMessage,
    Chunk,
    ErrorInfo,
    GroupStatus,
    ModelCard,
    PrefixSource,
    Prompt,
    Request,
    Result,
    TokenLogprob,
    TopLogprob,
)
from wire.sampling import SamplingParams

VERSION_1: list[tuple[object, str]] = [
    (
        ChatMessage("user", "Grüße"),
        "9301a475736572a74772c3bcc39f65",
    ),
    (
        Prompt(text="Once"),
        "9401a44f6e6365c0c0",
    ),
    (
        Prompt(token_ids=token_ids([0, 1, 2**32 - 1])),
        "9401c0c40c0000000001000000ffffffffc0",
    ),
    (
        SamplingParams(),
        "9f01c000cb3ff0000000000000cb3ff0000000000000c0cb0000000000000000c09090c2"
        "cb0000000000000000cb0000000000000000cb3ff0000000000000c0",
    ),
    (
        SamplingParams(
            max_tokens=7,
            min_tokens=2,
            temperature=0.5,
            top_p=0.75,
            top_k=40,
            min_p=0.25,
            seed=-3,
            stop=("\n", "END"),
            stop_token_ids=(2, 300),
            ignore_eos=True,
            presence_penalty=-0.5,
            frequency_penalty=1.5,
            repetition_penalty=1.25,
            logprobs=1,
        ),
        "9f010702cb3fe0000000000000cb3fe800000000000028cb3fd0000000000000fd92a10a"
        "a3454e449202cd012cc3cbbfe0000000000000cb3ff8000000000000cb3ff40000000000"
        "0001",
    ),
    (
        Request(RequestId("r-1"), Prompt(text="Once")),
        "9901a3722d3193a44f6e6365c0c09ec000cb3ff0000000000000cb3ff0000000000000c0"
        "cb0000000000000000c09090c2cb0000000000000000cb0000000000000000cb3ff00000"
        "00000000c0c0a87374616e64617264a764656661756c74c2c0",
    ),
    (
        Request(
            RequestId("r-2"),
            Prompt(messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"))),
            model="m",
            priority="interactive",
            tenant="t",
            stream=True,
            timeout_s=1.5,
        ),
        "9901a3722d3293c0c09292a673797374656da942652062726965662e92a475736572a248"
        "699ec000cb3ff0000000000000cb3ff0000000000000c0cb0000000000000000c09090c2"
        "cb0000000000000000cb0000000000000000cb3ff0000000000000c0a16dab696e746572"
        "616374697665a174c3cb3ff8000000000000",
    ),
    (
        TopLogprob(5, " a", -0.5),
        "940105a22061cbbfe0000000000000",
    ),
    (
        TokenLogprob(5, " a", -0.5, (TopLogprob(5, " a", -0.5), TopLogprob(6, "b", -1.0))),
        "950105a22061cbbfe0000000000000929305a22061cbbfe00000000000009306a162cbbff0000000000000",
    ),
    (
        Assignment(RequestId("r-1"), 1, token_ids([10, 11]), SamplingParams(), False),
        "9c01a3722d3101c4080a0000000b0000009ec000cb3ff0000000000000cb3ff000000000"
        "0000c0cb0000000000000000c09090c2cb0000000000000000cb0000000000000000cb3f"
        "f0000000000000c0c2c400c0c400a0c0c0",
    ),
    (
        Assignment(
            RequestId("r-2"),
            3,
            token_ids([10]),
            SamplingParams(seed=1),
            True,
            cache_salt=b"salt",
            deadline_ms=1_700_000_000_000,
            generated=token_ids([12, 13]),
            generated_text="ab",
            generated_logprobs=(TokenLogprob(12, "a", -0.25), TokenLogprob(13, "b", -0.5)),
            prefix_source=PrefixSource(GroupId("h"), 2, 64, "tcp://127.0.0.1:7000"),
        ),
        "9c01a3722d3203c4040a0000009ec000cb3ff0000000000000cb3ff0000000000000c0cb"
        "0000000000000000019090c2cb0000000000000000cb0000000000000000cb3ff0000000"
        "000000c0c3c40473616c74cf0000018bcfe56800c4080c0000000d000000a2616292940c"
        "a161cbbfd000000000000090940da162cbbfe00000000000009094a1680240b47463703a"
        "2f2f3132372e302e302e313a37303030",
    ),
    (
        PrefixSource(GroupId("h"), 2, 64, "tcp://127.0.0.1:7000"),
        "9501a1680240b47463703a2f2f3132372e302e302e313a37303030",
    ),
    (
        Chunk(fence=2, offset=16, token_ids=token_ids([7]), text="x", text_offset=30),
        "97010210c40407000000a1781ec0",
    ),
    (
        ErrorInfo("invalid_request", "too hot", "temperature"),
        "9401af696e76616c69645f72657175657374a7746f6f20686f74ab74656d7065726174757265",
    ),
    (
        Result(RequestId("r-1"), "cancelled"),
        "9e01a3722d31a963616e63656c6c6564c0a0c400c0c00000c0c00000",
    ),
    (
        Result(
            RequestId("r-2"),
            "done",
            model="m",
            text="ab",
            token_ids=token_ids([12, 13, 2]),
            finish_reason="stop",
            stop_reason=2,
            num_prompt_tokens=10,
            num_cached_tokens=4,
            logprobs=(TokenLogprob(12, "a", -0.25),),
            submitted_ms=1_700_000_000_000,
            finished_ms=1_700_000_000_250,
        ),
        "9e01a3722d32a4646f6e65a16da26162c40c0c0000000d00000002000000a473746f7002"
        "0a0491940ca161cbbfd000000000000090c0cf0000018bcfe56800cf0000018bcfe568fa",
    ),
    (
        Result(
            RequestId("r-3"), "failed", stop_reason="END", error=ErrorInfo("worker_lost", "gone")
        ),
        "9e01a3722d33a66661696c6564c0a0c400c0a3454e440000c093ab776f726b65725f6c6f"
        "7374a4676f6e65c00000",
    ),
    (
        ModelCard(
            name="m",
            tokenizer_json=b"{}",
            chat_template=None,
            bos_token="<s>",
            eos_token="</s>",
            bos_token_id=1,
            add_bos_token=True,
            vocab_size=32000,
            max_model_len=2048,
            block_size=16,
        ),
        "9b01a16dc4027b7dc0a33c733ea43c2f733e01c3cd7d00cd080010",
    ),
    (
        GroupStatus(
            group_id=GroupId("g"),
            epoch=2,
            model="m",
            tensor_parallel_size=2,
            credits=128,
            state="healthy",
            num_running=3,
            num_waiting=1,
            kv_cache_usage=0.5,
            cache_format="f",
            transfer_address="tcp://127.0.0.1:7000",
        ),
        "9c01a16702a16d02cc80a76865616c7468790301cb3fe0000000000000a166b47463703a"
        "2f2f3132372e302e302e313a37303030",
    ),
]


def name_of(value: object) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else ""


@pytest.mark.parametrize(("message", "data"), VERSION_1, ids=name_of)
def test_a_message_has_these_bytes(message: object, data: str) -> None:
    assert encode(message).hex() == data


@pytest.mark.parametrize(("message", "data"), VERSION_1, ids=name_of)
def test_these_bytes_are_that_message(message: object, data: str) -> None:
    assert decode(type(message), bytes.fromhex(data)) == message


def test_every_message_type_is_in_the_table() -> None:
    defined = {
        value
        for value in vars(wire.messages).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    assert {type(message) for message, _ in VERSION_1} == defined


def test_the_table_is_the_present_version() -> None:
    assert WIRE_VERSION == 1
