"""Dead letters as people and programs read them.

Prompts may be anybody's secret: they are shown only where `with_prompt` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wire.sampling import SamplingParams

if TYPE_CHECKING:
    from producer import DeadLetter
    from wire.messages import Prompt, Request

_HEADER = ("REQUEST", "AGE", "REASON", "TRIES")
_UNITS_S = (("d", 86_400), ("h", 3600), ("min", 60))


def table(letters: Sequence[DeadLetter]) -> list[str]:
    """A line for each letter, under a header."""
    rows = [_HEADER] + [
        (
            _printable(letter.request_id),
            _age(letter.age_s),
            _printable(letter.reason),
            _tries(letter),
        )
        for letter in letters
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def details(letter: DeadLetter, *, with_prompt: bool) -> list[str]:
    """All there is of a letter, a line for each fact."""
    facts = {
        "request": letter.request_id,
        "reason": letter.reason,
        "message": letter.message,
        "died": f"{_time(letter.died_ms)}, {_age(letter.age_s)} ago",
        "submitted": _time(letter.submitted_ms),
        "tries": _tries(letter),
        "journaled": count(letter.num_journaled, "token"),
        "priority": letter.priority,
        "stream": "yes" if letter.stream else "no",
    }
    if letter.unreadable is not None:
        facts["unreadable"] = letter.unreadable
    if letter.request is not None:
        facts |= _request_facts(letter.request, with_prompt=with_prompt)
    return [f"{name:<11} {_printable(value)}" for name, value in facts.items()]


def as_json(letter: DeadLetter, *, with_prompt: bool = False) -> dict[str, Any]:
    """A letter as a JSON object; its `request` is null where it was not read."""
    values = asdict(letter)
    if letter.request is not None:
        values["request"]["prompt"] = _prompt(letter.request.prompt) if with_prompt else None
    return values


def _tries(letter: DeadLetter) -> str:
    """How the letter's attempts ended."""
    ends = [(letter.num_crashes, "crash", "crashes"), (letter.num_errors, "error", "errors")]
    return ", ".join(count(number, one, many) for number, one, many in ends if number) or "none"


def count(number: int, one: str, many: str | None = None) -> str:
    """A number of things."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _request_facts(request: Request, *, with_prompt: bool) -> dict[str, str]:
    usual = asdict(SamplingParams())
    sampling = [
        f"{name}={value!r}"
        for name, value in asdict(request.sampling).items()
        if value != usual[name]
    ]
    return {
        "model": request.model or "any",
        "tenant": request.tenant,
        "timeout": "none" if request.timeout_s is None else f"{request.timeout_s:g} s",
        "sampling": ", ".join(sampling) or "default",
        "prompt": _prompt_text(request.prompt) if with_prompt else _outline(request.prompt),
    }


def _prompt(prompt: Prompt) -> str | list[int] | list[dict[str, str]]:
    if prompt.messages is not None:
        return [asdict(message) for message in prompt.messages]
    return prompt.text if prompt.text is not None else list(prompt.token_ids or ())


def _prompt_text(prompt: Prompt) -> str:
    if prompt.messages is not None:
        return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return str(_prompt(prompt))


def _outline(prompt: Prompt) -> str:
    if prompt.messages is not None:
        size = count(len(prompt.messages), "message")
    elif prompt.text is not None:
        size = count(len(prompt.text), "character")
    else:
        size = count(len(prompt.token_ids or ()), "token id")
    return f"{size}; --prompt shows it"


def _age(age_s: float) -> str:
    for unit, unit_s in _UNITS_S:
        if age_s >= unit_s:
            return f"{int(age_s // unit_s)} {unit}"
    return f"{int(age_s)} s"


def _time(server_ms: int) -> str:
    return datetime.fromtimestamp(server_ms / 1000, UTC).isoformat(" ", "seconds")


def _printable(text: str) -> str:
    """The text without what a terminal would obey: it may be a stranger's."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text
    )
