"""Messages to bytes and back: msgpack, positional, strict.

A message travels as one msgpack array: the wire version, then the fields in the order of the
dataclass. Nested messages are arrays of their fields. Token ids are packed little-endian uint32
`bin`. There are no maps and no ext types. Whoever changes a message raises `WIRE_VERSION`; the
tests hold the bytes of every version.

Decoding checks the size before it looks at the data, then the version, then the number and the
type of all fields. What does not fit raises WireError, which names the field.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, Literal, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from wire.errors import WireError
from wire.ids import TokenIds, token_ids_from_bytes, token_ids_to_bytes

WIRE_VERSION = 1

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The largest message that is decoded at all; Redis itself takes strings of up to 512 MiB."""

Message = TypeVar("Message")
Encode = Callable[[Any], Any]
Decode = Callable[[Any], Any]


def encode(message: object) -> bytes:
    """The bytes of a message. What it holds is trusted to have the declared types."""
    to_wire, _ = _message_codec(cast("Hashable", type(message)))
    return cast("bytes", msgpack.packb([WIRE_VERSION, *to_wire(message)], use_bin_type=True))


def decode(
    message_type: type[Message], data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES
) -> Message:
    """A message of the given type from its bytes.

    Raises WireError for bytes that are not exactly such a message, and InvalidRequest where a
    well-formed message carries a value out of its range.
    """
    name = message_type.__name__
    if len(data) > max_bytes:
        raise WireError(f"{name} of {len(data)} bytes; at most {max_bytes} are accepted")
    try:
        fields = msgpack.unpackb(data, raw=False, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"{name} is not a valid msgpack message: {error}") from error
    if not isinstance(fields, list) or not fields:
        raise WireError(f"{name} must be a msgpack array that begins with the wire version")
    if type(fields[0]) is not int or fields[0] != WIRE_VERSION:
        raise WireError(
            f"{name} has wire version {fields[0]!r}; this process speaks version {WIRE_VERSION}"
        )
    _, from_wire = _message_codec(cast("Hashable", message_type))
    return cast("Message", from_wire(fields[1:]))


@cache
def _message_codec(message_type: Any) -> tuple[Encode, Decode]:
    name = message_type.__name__
    hints = get_type_hints(message_type)
    names = [field.name for field in dataclasses.fields(message_type)]
    codecs = [_value_codec(hints[field], f"{name}.{field}") for field in names]
    encoders = [(field, encoder) for field, (encoder, _) in zip(names, codecs, strict=True)]
    decoders = [decoder for _, decoder in codecs]

    def to_wire(message: Any) -> list[Any]:
        return [encoder(getattr(message, field)) for field, encoder in encoders]

    def from_wire(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(decoders):
            got = len(value) if isinstance(value, list) else type(value).__name__
            raise WireError(f"{name} has {len(decoders)} fields, got {got}")
        # Message constructors check ranges and raise InvalidRequest by themselves.
        return message_type(*(decoder(item) for decoder, item in zip(decoders, value, strict=True)))

    return to_wire, from_wire


def _value_codec(hint: Any, where: str) -> tuple[Encode, Decode]:
    """Encoder and decoder for one type hint; `where` names the field in errors."""
    if isinstance(hint, NewType):
        return _value_codec(hint.__supertype__, where)
    if hint is TokenIds:
        return token_ids_to_bytes, _token_ids_decoder(where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _message_codec(hint)
    origin = get_origin(hint)
    if origin is tuple:
        item, ellipsis = get_args(hint)
        assert ellipsis is Ellipsis, f"{where}: only tuple[X, ...] can cross the wire"
        return _tuple_codec(item, where)
    if origin in (Union, types.UnionType):
        return _union_codec(get_args(hint), where)
    if origin is Literal:
        return _identity, _literal_decoder(get_args(hint), where)
    assert hint in (int, float, str, bool, bytes), f"{where}: {hint} cannot cross the wire"
    return _identity, _scalar_decoder((hint,), where)


def _identity(value: Any) -> Any:
    return value


def _scalar_decoder(allowed: tuple[type, ...], where: str) -> Decode:
    # Exact types: a bool is an int to isinstance, but not on this wire.
    accepted = frozenset(allowed)
    widens = float in accepted and int not in accepted
    names = " or ".join(kind.__name__ for kind in allowed)

    def from_wire(value: Any) -> Any:
        kind = type(value)
        if kind in accepted:
            return value
        if widens and kind is int:
            return float(value)
        raise WireError(f"{where} must be {names}, got {kind.__name__}")

    return from_wire


def _literal_decoder(allowed: tuple[Any, ...], where: str) -> Decode:
    def from_wire(value: Any) -> Any:
        if type(value) is str and value in allowed:
            return value
        raise WireError(f"{where} must be one of {', '.join(map(str, allowed))}; got {value!r}")

    return from_wire


def _token_ids_decoder(where: str) -> Decode:
    def from_wire(value: Any) -> TokenIds:
        if not isinstance(value, bytes) or len(value) % 4:
            raise WireError(f"{where} must be packed uint32 token ids, 4 bytes each")
        return token_ids_from_bytes(value)

    return from_wire


def _tuple_codec(item: Any, where: str) -> tuple[Encode, Decode]:
    item_to_wire, item_from_wire = _value_codec(item, f"{where}[]")

    def to_wire(value: Any) -> list[Any]:
        return [item_to_wire(element) for element in value]

    def from_wire(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise WireError(f"{where} must be an array, got {type(value).__name__}")
        return tuple(item_from_wire(element) for element in value)

    return to_wire, from_wire


def _union_codec(options: tuple[Any, ...], where: str) -> tuple[Encode, Decode]:
    """`X | None` for any X, and unions of scalars."""
    kinds = tuple(option for option in options if option is not types.NoneType)
    optional = len(kinds) < len(options)
    if len(kinds) == 1:
        some_to_wire, some_from_wire = _value_codec(kinds[0], where)
    else:
        some_to_wire, some_from_wire = _identity, _scalar_decoder(kinds, where)

    def to_wire(value: Any) -> Any:
        return None if value is None else some_to_wire(value)

    def from_wire(value: Any) -> Any:
        if value is None and optional:
            return None
        return some_from_wire(value)

    return to_wire, from_wire
