"""Strict reading of named fields of untrusted mappings: config.json, GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wire.errors import ModelError


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping read from the file `origin`, whose values are checked as they are taken.

    A field that is absent, or null, takes `default`; without one it is a ModelError.
    """

    values: Mapping[str, object]
    origin: str
    prefix: str = ""

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(self.prefix + name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at most 64 bits: larger ones do not fit a float or a tensor."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        if abs(value) >= 2**64:
            raise self._wrong(name, value, "a whole number of at most 64 bits")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a finite number")
        try:
            number = float(value)
        except OverflowError:  # JSON's whole numbers have no bound
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong(name, value, "a finite number")
        return number

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(name, default)
        if value <= 0:
            raise self._wrong(name, value, "above zero")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A whole number or a list of them, as a tuple; empty if the field is absent."""
        value = self.values.get(self.prefix + name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self._wrong(name, value, "a whole number or a list of them")
        return tuple(items)

    def mapping(self, name: str) -> Fields:
        """A nested mapping; empty if the field is absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.origin} ({self.prefix}{name})")

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(self.prefix + name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.origin}: field {self.prefix}{name} is missing")
        return value

    def _wrong(self, name: str, value: object, expected: str) -> ModelError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ModelError(
            f"{self.origin}: field {self.prefix}{name} is {shown}; it must be {expected}"
        )
