"""How tokens are drawn: the sampling parameters of one request, with their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wire.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_UINT32 = 2**32 - 1
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters, with vLLM's names and meanings.

    `max_tokens` None means: as many as the context has room for. `temperature` 0 is greedy.
    `top_k` None, `top_p` 1 and `min_p` 0 switch that filter off. `stop` strings end the text and
    are not part of it; neither they, nor `stop_token_ids`, nor the end-of-sequence token count
    before `min_tokens` tokens were generated. `logprobs` n asks for the chosen token's log
    probability and the n most likely ones' at each position; None asks for none.
    Penalties follow OpenAI (presence, frequency: over generated tokens) and CTRL
    (repetition, arXiv 1909.05858: over prompt and generated tokens).
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise InvalidRequest, naming the field and its value, for what is out of range."""
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, MAX_UINT32)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_UINT32, "0 to max_tokens")
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, math.nextafter(0.0, 1.0), 1.0, "above 0, up to 1")
        if self.top_k is not None:
            _check("top_k", self.top_k, 1, MAX_UINT32)
        _check("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            math.nextafter(0.0, 1.0),
            100.0,
            "above 0, up to 100",
        )
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check("number of stop strings", len(self.stop), 0, MAX_STOP_STRINGS, field="stop")
        for text in self.stop:
            _check("length of a stop string", len(text), 1, MAX_STOP_STRING_CHARS, field="stop")
        _check(
            "number of stop_token_ids",
            len(self.stop_token_ids),
            0,
            MAX_STOP_TOKEN_IDS,
            field="stop_token_ids",
        )
        for token_id in self.stop_token_ids:
            _check("stop_token_ids", token_id, 0, MAX_UINT32)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of drawing one."""
        return self.temperature == 0.0


def _check(
    name: str,
    value: float,
    low: float,
    high: float,
    allowed: str | None = None,
    *,
    field: str | None = None,
) -> None:
    # Written so that NaN, which compares false with everything, is refused.
    if not low <= value <= high:
        raise InvalidRequest(
            f"{name} is {value}; it must be {allowed or f'{low} to {high}'}", field=field or name
        )
