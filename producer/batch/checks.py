"""Checks of single JSON values: each returns the value, its type known, or says what is wrong."""

from __future__ import annotations

import json

from wire.errors import InvalidRequest

_MAX_SHOWN_CHARS = 60


def boolean(value: object, field: str) -> bool:
    """`value`, if it is true or false. Raises InvalidRequest naming `field`."""
    if not isinstance(value, bool):
        raise _wrong_type(value, field, "true or false")
    return value


def integer(value: object, field: str) -> int:
    """`value`, if it is a whole number of at most 64 bits. Raises InvalidRequest naming `field`.

    Neither true nor 1.0 is one: what was meant there is better asked than guessed.
    """
    if type(value) is not int:
        raise _wrong_type(value, field, "a whole number")
    if value.bit_length() > 64:
        raise InvalidRequest(f"{field} is {shorten(value)}; it is far too large", field=field)
    return value


def number(value: object, field: str) -> float:
    """`value` as a float, NaN and infinities included, whose range is for others to refuse.

    Raises InvalidRequest naming `field`.
    """
    if isinstance(value, float):
        return value
    if type(value) is not int:
        raise _wrong_type(value, field, "a number")
    return float(integer(value, field))


def text(value: object, field: str) -> str:
    r"""`value`, if it is a string that UTF-8 can hold. Raises InvalidRequest naming `field`.

    JSON can spell half of a surrogate pair (`"\ud83d"`), which is no character.
    """
    if not isinstance(value, str):
        raise _wrong_type(value, field, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise InvalidRequest(
            f"{field} holds the lone surrogate {half} at character {error.start + 1}; "
            f"write whole characters",
            field=field,
        ) from None
    return value


def array(value: object, field: str) -> list[object]:
    """`value`, if it is a list. Raises InvalidRequest naming `field`."""
    if not isinstance(value, list):
        raise _wrong_type(value, field, "a list")
    return value


def json_object(value: object, field: str) -> dict[str, object]:
    """`value`, if it is a JSON object. Raises InvalidRequest naming `field`."""
    if not isinstance(value, dict):
        raise _wrong_type(value, field, "an object")
    return value


def required(container: dict[str, object], key: str, field: str) -> object:
    """The value of `key`, which has to be there. Raises InvalidRequest naming `field`."""
    if key not in container:
        raise InvalidRequest(f"{field} is missing; add it", field=field)
    return container[key]


def shorten(value: object) -> str:
    """`value` as JSON on one line, safe to print, and short however large it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        head = value[:_MAX_SHOWN_CHARS]
        # What a terminal might act upon, or cannot encode, is shown as an escape.
        shown = json.dumps(head, ensure_ascii=not head.isprintable())
        return shown if len(value) == len(head) else f"{shown}... ({len(value)} characters)"
    shown = json.dumps(value)
    if len(shown) > _MAX_SHOWN_CHARS:
        return f"{shown[:20]}... ({len(shown)} digits)"
    return shown


def path(key: str) -> str:
    """The name of an unforeseen key: itself, or something short and printable in its place."""
    if key and len(key) <= _MAX_SHOWN_CHARS and key.isprintable():
        return key
    return shorten(key)


def _wrong_type(value: object, field: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {shorten(value)}; it must be {wanted}", field=field)
