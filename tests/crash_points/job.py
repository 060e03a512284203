"""The job: 64 requests whose right answers are known to the token.

A quarter of them stream. They end in each of the ways in which an answer can end (at their limit,
at the end of sequence, at a stop string that spans tokens, behind characters of several bytes),
after 3 to 14 tokens, so that at any moment some have just begun a block and some are to end one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from gpu_worker.engine.stub import stub_model_card
from wire.ids import RequestId
from wire.messages import FinishReason, Prompt, Request, Result
from wire.sampling import SamplingParams

NUM_REQUESTS = 64
BLOCK_SIZE = 4
SHORTEST, LONGEST = 3, 14

_EOS = 0
_STOP = "|end"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_tokenizer = Tokenizer.from_buffer(stub_model_card().tokenizer_json)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request must be answered with: the stub engine repeats the prompt."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason

    def difference(self, result: Result) -> str | None:
        """In which way a result is not this answer, None if it is."""
        if result.state != "done":
            return f"{result.state}: {result.error}"
        if tuple(result.token_ids) != self.token_ids:
            return f"tokens {list(result.token_ids)} in place of {list(self.token_ids)}"
        if result.text != self.text or result.finish_reason != self.finish_reason:
            return f"{result.text!r} ({result.finish_reason}) in place of {self}"
        return None


@dataclass(frozen=True, slots=True)
class Task:
    """One request of the job, and its answer."""

    request: Request
    answer: Answer

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id


def make_job() -> list[Task]:
    """The same 64 requests every time."""
    return [_task(index) for index in range(NUM_REQUESTS)]


def _task(index: int) -> Task:
    length = SHORTEST + 7 * index % (LONGEST - SHORTEST + 1)
    text = "".join(_ALPHABET[(index + at) % len(_ALPHABET)] for at in range(length))
    match index // 4 % 4:
        case 0:  # at its limit
            prompt, sampling = text + "more", SamplingParams(max_tokens=length)
            answer = Answer(_ids(text), text, "length")
        case 1:  # at the end of sequence
            prompt, sampling = text[1:], SamplingParams()
            answer = Answer((*_ids(prompt), _EOS), prompt, "stop")
        case 2:  # at a stop string
            text = text[len(_STOP) :]
            prompt, sampling = f"{text}{_STOP}more", SamplingParams(stop=(_STOP,))
            answer = Answer(_ids(text + _STOP), text, "stop")
        case _:  # in characters of two and three bytes
            text = ("äβ€" * length).encode()[:length].decode(errors="ignore")
            prompt, sampling = text + "more", SamplingParams(max_tokens=len(text.encode()))
            answer = Answer(_ids(text), text, "length")
    request = Request(
        RequestId(f"request-{index}"), Prompt(text=prompt), sampling=sampling, stream=index % 4 == 1
    )
    return Task(request, answer)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer.encode(text, add_special_tokens=False).ids)
