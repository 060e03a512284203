"""What is asked in a run, and what the right answer is: a pure function of seed and number.

The stub engine answers a prompt with the prompt, so the right answer to every request is known,
however it is cut short.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Literal

from wire.ids import RequestId
from wire.messages import PRIORITIES, Prompt, Request
from wire.sampling import SamplingParams

Reading = Literal["stream", "result", "hop"]
"""How its reader reads: as it comes; all at the end; or as it comes, and going on elsewhere."""

Route = Literal["own", "shared", "bulk"]
"""Who is told of the end: its producer, a group of consumers, or an endless `submit_many`."""

_LETTERS = string.ascii_letters + string.digits + "     .,;"
_WIDE = "äßøñ€字🙂"


@dataclass(frozen=True, slots=True)
class Question:
    """A request, the moment at which it comes, and what is to become of it.

    `uncut` is how the answer would go on without a stop string: one that is cancelled may end
    within it. Poison ends every group that computes it, and has no answer.
    """

    at_s: float
    request: Request
    answer: str
    uncut: str
    reading: Reading = "result"
    route: Route = "own"
    cancel_after_s: float | None = None
    is_poison: bool = False

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.request.request_id


def poison(at_s: float) -> Question:
    """A request that computes for long enough to be caught at it."""
    sampling = SamplingParams(max_tokens=1000, min_tokens=1000, ignore_eos=True)
    request = Request(RequestId("poison"), Prompt(text="poison"), sampling)
    return Question(at_s, request, answer="", uncut="poison" * 200, is_poison=True)


def draw_questions(seed: int, seconds: float, *, per_s: float) -> list[Question]:
    """The requests of a run, in the order in which they come."""
    rng = random.Random(f"questions of {seed}")
    questions: list[Question] = []
    at_s = rng.expovariate(per_s)
    while at_s < seconds:
        questions.append(_draw(rng, f"q{seed}-{len(questions)}", at_s))
        at_s += rng.expovariate(per_s)
    return questions


def _draw(rng: random.Random, name: str, at_s: float) -> Question:
    prompt = f"{name} " + _text(rng, rng.randint(5, 90))
    sampling, answer = _sampling(rng, prompt)
    route: Route = rng.choice(("own", "own", "own", "shared", "bulk"))
    readings: tuple[Reading, ...] = ("stream", "stream", "result", "hop")
    cancels = route != "bulk" and rng.random() < 0.1
    return Question(
        at_s=at_s,
        request=Request(
            RequestId(name),
            Prompt(text=prompt),
            sampling,
            priority=rng.choice(PRIORITIES),
            stream=rng.random() < 0.5,
            timeout_s=rng.uniform(0.5, 6.0) if rng.random() < 0.1 else None,
        ),
        answer=answer,
        uncut=prompt if sampling.stop else answer,
        reading=rng.choice(readings) if route == "own" else "result",
        route=route,
        cancel_after_s=rng.uniform(0.0, 3.0) if cancels else None,
    )


def _sampling(rng: random.Random, prompt: str) -> tuple[SamplingParams, str]:
    """How the answer is to be cut, and what is left of it."""
    kind = rng.choice(("whole", "long", "long", "short", "stop"))
    if kind == "long":
        plain = prompt.isascii()
        num_tokens = rng.randint(100, 700) if plain else 4 * len(prompt.encode())
        sampling = SamplingParams(max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True)
        return sampling, (prompt * num_tokens)[:num_tokens] if plain else prompt * 4
    if kind == "short" and prompt.isascii():
        num_tokens = rng.randint(1, len(prompt))
        return SamplingParams(max_tokens=num_tokens), prompt[:num_tokens]
    if kind == "stop":
        begin = rng.randrange(len(prompt) - 3)
        stop = prompt[begin : begin + 3]
        return SamplingParams(stop=(stop,)), prompt[: prompt.index(stop)]
    return SamplingParams(), prompt


def _text(rng: random.Random, num_chars: int) -> str:
    alphabet = _LETTERS + _WIDE if rng.random() < 0.3 else _LETTERS
    return "".join(rng.choices(alphabet, k=num_chars))
