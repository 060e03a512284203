"""One line of the input, checked: a row that can be submitted, or the reason why it cannot.

A row is what OpenAI's batch API calls the request input object:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

from producer.batch import checks
from producer.batch.body import parse_body
from producer.batch.checks import shorten
from producer.batch.fields import CHAT, COMPLETIONS, Endpoint, unknown_field
from wire.errors import InvalidRequest
from wire.messages import Prompt
from wire.sampling import SamplingParams

MAX_CUSTOM_ID_CHARS = 512

DUPLICATE = "duplicate_custom_id"
"""OpenAI's code for a row whose custom_id an earlier row has."""

RowKey: TypeAlias = str | int
"""What tells a row from the others: its custom_id, or its number if it has none of its own."""

_ENVELOPE = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row that can be submitted. `row_number` is its line's number in the input, from 1."""

    row_number: int
    custom_id: str
    endpoint: Endpoint
    model: str | None
    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer; `str()` of it is one printable line.

    `custom_id` is None where the line does not give one. `field` names the part at fault,
    relative to the body, where there is one.
    """

    row_number: int
    custom_id: str | None
    code: str
    message: str
    field: str | None = None

    def __str__(self) -> str:
        """Row, custom_id, and what is wrong."""
        name = "" if self.custom_id is None else f" (custom_id {shorten(self.custom_id)})"
        return f"row {self.row_number}{name}: {self.message}"

    @property
    def key(self) -> RowKey:
        """What tells this row from the others."""
        return row_key(self.row_number, self.custom_id, self.code)

    @classmethod
    def of(cls, row_number: int, custom_id: str | None, error: InvalidRequest) -> RowFailure:
        """The failure of a row that `error` speaks of."""
        return cls(row_number, custom_id, error.code, str(error), error.field)


def row_key(row_number: int, custom_id: str | None, code: str) -> RowKey:
    """The key of a row that failed with `code`."""
    return row_number if custom_id is None or code == DUPLICATE else custom_id


@dataclass(frozen=True, slots=True)
class LoadedRow:
    """A line that is a JSON object, not looked into but for its custom_id, None if it has none."""

    row_number: int
    custom_id: str | None
    fields: dict[str, object]
    repeated_key: str | None

    @property
    def key(self) -> RowKey:
        """What tells this row from the others, provided that no earlier one has its custom_id."""
        return self.row_number if self.custom_id is None else self.custom_id


def parse_row(line: bytes, row_number: int) -> BatchRow | RowFailure:
    """Check one line, without its line break. Never raises, whatever the bytes."""
    loaded = load_row(line, row_number)
    return loaded if isinstance(loaded, RowFailure) else check_row(loaded)


def load_row(line: bytes, row_number: int) -> LoadedRow | RowFailure:
    """The first half of `parse_row`, a third of the work: enough to tell which row it is."""
    try:
        fields, repeated_key = _load(line.decode())
        return LoadedRow(row_number, _valid_custom_id(fields), fields, repeated_key)
    except UnicodeDecodeError as error:
        refusal = InvalidRequest(
            f"the line is not UTF-8 at byte {error.start + 1} (0x{line[error.start]:02x}); "
            f"save the file as UTF-8"
        )
        return RowFailure.of(row_number, _salvaged_custom_id(line), refusal)
    except InvalidRequest as error:
        return RowFailure.of(row_number, None, error)


def check_row(row: LoadedRow) -> BatchRow | RowFailure:
    """The second half of `parse_row`."""
    try:
        if row.repeated_key is not None:
            name = checks.path(row.repeated_key)
            raise InvalidRequest(f"{name} is given twice; keep one of the two", field=name)
        return _parse(row.fields, row.row_number)
    except InvalidRequest as error:
        return RowFailure.of(row.row_number, row.custom_id, error)


def _parse(row: dict[str, object], row_number: int) -> BatchRow:
    for key in row:
        if key not in _ENVELOPE:
            raise unknown_field(key, _ENVELOPE)
    custom_id = _custom_id(row)
    method = checks.required(row, "method", "method")
    if method != "POST":
        raise InvalidRequest(f'method is {shorten(method)}; it must be "POST"', field="method")
    endpoint = _endpoint(row)
    body = checks.json_object(checks.required(row, "body", "body"), "body")
    model, prompt, sampling = parse_body(endpoint, body)
    return BatchRow(row_number, custom_id, endpoint, model, prompt, sampling)


def _custom_id(row: dict[str, object]) -> str:
    custom_id = checks.text(checks.required(row, "custom_id", "custom_id"), "custom_id")
    if not custom_id:
        raise InvalidRequest(
            "custom_id is empty; give each row a name of its own", field="custom_id"
        )
    if len(custom_id) > MAX_CUSTOM_ID_CHARS:
        raise InvalidRequest(
            f"custom_id is {shorten(custom_id)}; it must be at most {MAX_CUSTOM_ID_CHARS} "
            f"characters long",
            field="custom_id",
        )
    return custom_id


def _valid_custom_id(row: dict[str, object]) -> str | None:
    try:
        return _custom_id(row)
    except InvalidRequest:
        return None


def _salvaged_custom_id(line: bytes) -> str | None:
    """The custom_id of a line that is not UTF-8, if the damage is elsewhere."""
    try:
        row, _ = _load(line.decode(errors="replace"))
    except InvalidRequest:
        return None
    custom_id = _valid_custom_id(row)
    return None if custom_id is None or "\N{REPLACEMENT CHARACTER}" in custom_id else custom_id


def _endpoint(row: dict[str, object]) -> Endpoint:
    url = checks.required(row, "url", "url")
    if url not in (CHAT, COMPLETIONS):
        raise InvalidRequest(
            f"url is {shorten(url)}; it must be {CHAT} or {COMPLETIONS}", field="url"
        )
    return url


class _Keys:
    """Builds objects for the JSON decoder, and remembers a key that one of them had twice.

    The decoder would keep the last of the two without a word.
    """

    def __init__(self) -> None:
        self.repeated: str | None = None

    def build(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        built = dict(pairs)
        if len(built) != len(pairs) and self.repeated is None:
            [(self.repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        return built


def _load(line: str) -> tuple[dict[str, object], str | None]:
    """The line's JSON object, and a key that it gives twice. NaN and the like come as floats."""
    keys = _Keys()
    try:
        row = json.loads(line, object_pairs_hook=keys.build)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the line is not JSON at character {error.pos + 1}: {error.msg}; "
            f"write one JSON object on each line"
        ) from None
    except RecursionError:
        raise InvalidRequest("the line is nested too deeply; flatten it") from None
    except ValueError:  # int() refuses to read more digits than sys.get_int_max_str_digits()
        raise InvalidRequest("the line holds a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise InvalidRequest(
            f"the line is {shorten(row)}; it must be an object with custom_id, method, url, body"
        )
    return row, keys.repeated
