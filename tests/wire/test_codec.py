"""The codec takes exactly what it would write, and nothing else."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wire.messages
from wire.codec import WIRE_VERSION, decode, encode
from wire.errors import ForebayError, InvalidRequest, WireError
from wire.ids import RequestId, token_ids
from wire.messages import (
    PRIORITIES,
    Assignment,
    ChatMessage,
    Chunk,
    GroupStatus,
    ModelCard,
    Prompt,
    Request,
    Result,
    TokenLogprob,
    TopLogprob,
)
from wire.sampling import SamplingParams

MESSAGE_TYPES: list[type[Any]] = [Request, Assignment, Chunk, Result, ModelCard, GroupStatus]

CHUNK = Chunk(fence=2, offset=16, token_ids=token_ids([7, 8]), text="xy", text_offset=30)
CHUNK_FIELDS = [WIRE_VERSION, 2, 16, b"\x07\0\0\0\x08\0\0\0", "xy", 30, None]


def pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def test_a_message_is_one_array_of_the_version_and_its_fields() -> None:
    assert msgpack.unpackb(encode(CHUNK)) == CHUNK_FIELDS
    assert decode(Chunk, pack(CHUNK_FIELDS)) == CHUNK


@pytest.mark.parametrize("version", [0, 2, -1, 2**64 - 1, True, "1", 1.0, None, [1], b"\x01"])
def test_another_version_is_refused_before_the_fields_are_looked_at(version: object) -> None:
    with pytest.raises(WireError, match=r"Chunk has wire version .*; this process speaks version"):
        decode(Chunk, pack([version, "fields of the future"]))


@pytest.mark.parametrize(
    "fields", [CHUNK_FIELDS[:-1], [*CHUNK_FIELDS, None], [WIRE_VERSION]], ids=len
)
def test_a_missing_or_an_extra_field_is_refused(fields: list[Any]) -> None:
    with pytest.raises(WireError, match=f"Chunk has 6 fields, got {len(fields) - 1}"):
        decode(Chunk, pack(fields))


@pytest.mark.parametrize(
    ("index", "value", "complaint"),
    [
        (1, "2", "Chunk.fence must be int, got str"),
        (1, True, "Chunk.fence must be int, got bool"),
        (1, 2.0, "Chunk.fence must be int, got float"),
        (1, None, "Chunk.fence must be int, got NoneType"),
        (2, [16], "Chunk.offset must be int, got list"),
        (3, b"\0\0\0", "Chunk.token_ids must be packed uint32"),
        (3, "\0\0\0\0", "Chunk.token_ids must be packed uint32"),
        (3, [7], "Chunk.token_ids must be packed uint32"),
        (4, b"xy", "Chunk.text must be str, got bytes"),
        (6, "no", r"Chunk.logprobs must be an array, got str"),
        (6, [None], "TokenLogprob has 4 fields, got NoneType"),
        (6, [[1, "a", "b", []]], "TokenLogprob.logprob must be float, got str"),
        (6, [[1, "a", 0.5, [[1, "a"]]]], "TopLogprob has 3 fields, got 2"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(index: int, value: object, complaint: str) -> None:
    fields = list(CHUNK_FIELDS)
    fields[index] = value
    with pytest.raises(WireError, match=complaint):
        decode(Chunk, pack(fields))


def test_whole_numbers_are_floats_too() -> None:
    fields = [*CHUNK_FIELDS[:-1], [[1, "a", -1, []]]]
    [logprob] = decode(Chunk, pack(fields)).logprobs or ()
    assert isinstance(logprob.logprob, float)


def test_a_word_that_is_none_of_the_allowed_ones_is_refused() -> None:
    data = encode(Request(RequestId("r"), Prompt(text="x")))
    assert data.count(b"standard") == 1
    with pytest.raises(WireError, match=r"Request.priority must be one of interactive, standard"):
        decode(Request, data.replace(b"standard", b"whenever"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack(None),
        pack([]),
        pack({}),
        pack("text"),
        pack({1: 2}),
        pack([{1: 2}]),
        pack([WIRE_VERSION, {}, 16, b"", "", None]),
        pack([WIRE_VERSION, msgpack.ExtType(5, b""), 16, b"", "", None]),
        pack([WIRE_VERSION, msgpack.ExtType(5, b"data"), 16, b"", "", None]),
        pack([WIRE_VERSION, msgpack.Timestamp(0), 16, b"", "", None]),
        pack(CHUNK_FIELDS)[:-1],
        pack(CHUNK_FIELDS) + b"\0",
        b"\x91" * 100_000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        pack(CHUNK_FIELDS).replace(b"xy", b"\xff\xfe"),
    ],
)
def test_what_is_no_message_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError, match="Chunk"):
        decode(Chunk, data)


def test_the_size_is_checked_before_the_data() -> None:
    with pytest.raises(WireError, match="Chunk of 11 bytes; at most 10 are accepted"):
        decode(Chunk, b"\xc1" * 11, max_bytes=10)
    data = encode(CHUNK)
    assert decode(Chunk, data, max_bytes=len(data)) == CHUNK


def test_a_value_out_of_its_range_is_an_invalid_request() -> None:
    hot = encode(SamplingParams(temperature=99.0)).replace(pack(99.0), pack(math.nan))
    with pytest.raises(InvalidRequest, match="temperature is nan"):
        decode(SamplingParams, hot)


@pytest.mark.parametrize("prompt", [[None, None, None], ["text", b"\0\0\0\0", None]])
def test_a_prompt_is_exactly_one_of_its_forms(prompt: list[object]) -> None:
    with pytest.raises(InvalidRequest, match="one of text, token ids and messages"):
        decode(Prompt, pack([WIRE_VERSION, *prompt]))


# Whatever comes

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=8)
    | st.sampled_from(["standard", "done", "healthy"]),
    lambda inner: st.lists(inner, max_size=16),
    max_leaves=40,
)


@given(st.sampled_from(MESSAGE_TYPES), st.binary(max_size=64))
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_a_typed_error(kind: type[Any], data: bytes) -> None:
    check(kind, data)


@given(st.sampled_from(MESSAGE_TYPES), st.lists(values, min_size=3, max_size=14))
@settings(max_examples=300)
def test_any_array_is_a_message_or_a_typed_error(kind: type[Any], fields: list[Any]) -> None:
    check(kind, pack([WIRE_VERSION, *fields]))


def check(kind: type[Any], data: bytes) -> None:
    try:
        message = decode(kind, data)
    except ForebayError:
        return
    assert type(message) is kind
    assert decode(kind, encode(message)) == message or "nan" in repr(message)


# Round trips

texts = st.text(max_size=20)
counts = st.integers(0, 2**40)
logs = st.floats(allow_nan=False, max_value=0)
ids = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(token_ids)
top_logprobs = st.builds(TopLogprob, counts, texts, logs)
logprobs = st.none() | st.lists(
    st.builds(TokenLogprob, counts, texts, logs, st.lists(top_logprobs, max_size=2).map(tuple)),
    max_size=3,
).map(tuple)
prompts = (
    st.builds(Prompt, text=texts)
    | st.builds(Prompt, token_ids=ids)
    | st.builds(
        Prompt, messages=st.lists(st.builds(ChatMessage, texts, texts), max_size=3).map(tuple)
    )
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(5, 100),
    min_tokens=st.integers(0, 5),
    temperature=st.floats(0, 100),
    top_k=st.none() | st.integers(1, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
messages = (
    st.builds(
        Request,
        texts,
        prompts,
        sampling,
        st.none() | texts,
        st.sampled_from(PRIORITIES),
        texts,
        st.booleans(),
        st.none() | st.floats(0, 1e9),
    )
    | st.builds(Chunk, counts, counts, ids, texts, counts, logprobs)
    | st.builds(
        Assignment,
        texts,
        counts,
        ids,
        sampling,
        st.booleans(),
        st.binary(max_size=16),
        st.none() | counts,
        ids,
        texts,
        logprobs,
    )
    | st.builds(
        Result,
        texts,
        st.sampled_from(["done", "failed", "cancelled", "expired"]),
        text=texts,
        token_ids=ids,
        finish_reason=st.sampled_from(["stop", "length", None]),
        stop_reason=st.none() | texts | counts,
        logprobs=logprobs,
    )
)


@given(messages)
@settings(max_examples=200)
def test_what_is_encoded_decodes_to_the_same(message: object) -> None:
    assert decode(type(message), encode(message)) == message


def test_token_ids_stay_packed() -> None:
    decoded = decode(Chunk, encode(replace(CHUNK, token_ids=token_ids(range(1000)))))
    assert isinstance(decoded.token_ids, array)
    assert decoded.token_ids.itemsize == 4
    assert len(encode(decoded)) < 4100


def test_every_message_type_can_cross() -> None:
    """A field of a type that the codec does not know is found here, not by the first user."""
    for value in vars(wire.messages).values():
        if isinstance(value, type) and hasattr(value, "__dataclass_fields__"):
            with pytest.raises(WireError):
                decode(value, b"")
