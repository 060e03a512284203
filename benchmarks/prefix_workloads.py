"""Prompts that share prefixes: a recorded trace of conversations, and one made from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from wire.ids import TokenIds, token_ids

BLOCK_SIZE = 16
TRACE_BLOCK = 512
"""Tokens that one hash of the trace stands for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: its prompt, and how many tokens its answer has."""

    prompt: TokenIds
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they come, and what one token of them stands for."""

    name: str
    asks: list[Ask]
    scale: int = 1

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(len(ask.prompt) for ask in self.asks)


def conversation_trace(path: Path, num_requests: int | None = None) -> Workload:
    """The trace at a scale of 1:32, so that its blocks of 512 tokens become blocks of 16.

    A line is an object with `input_length`, `output_length` and `hash_ids`; equal ids are equal
    blocks. Raises OSError, ValueError, KeyError for another file.
    """
    scale = TRACE_BLOCK // BLOCK_SIZE
    asks = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            num_full, rest = divmod(int(entry["input_length"]), TRACE_BLOCK)
            prompt = token_ids()
            for block in entry["hash_ids"][:num_full]:
                prompt.extend([block + 1] * BLOCK_SIZE)
            if rest >= scale:
                prompt.extend([entry["hash_ids"][num_full] + 1] * (rest // scale))
            if prompt:
                asks.append(Ask(prompt, max(1, int(entry["output_length"]) // scale)))
            if len(asks) == num_requests:
                break
    return Workload("conversation trace", asks, scale)


def shared_prefixes(
    num_requests: int = 4000, *, num_systems: int = 8, num_examples: int = 12, seed: int = 1
) -> Workload:
    """Prompts of three parts: instructions, examples that belong to them, a question of its own.

    Some instructions and some examples are asked for much more often than others (weights of
    1/rank). Instructions have 256 to 768 tokens, examples as many, questions 16 to 160.
    """
    choose = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [choose.randrange(1, 50_000) for _ in range(choose.randint(low, high))]

    systems = [words(256, 768) for _ in range(num_systems)]
    examples = [[words(256, 768) for _ in range(num_examples)] for _ in systems]
    system_weights = [1 / rank for rank in range(1, num_systems + 1)]
    example_weights = [1 / rank for rank in range(1, num_examples + 1)]
    asks = []
    for _ in range(num_requests):
        (system,) = choose.choices(range(num_systems), system_weights)
        (example,) = choose.choices(range(num_examples), example_weights)
        prompt = token_ids(systems[system] + examples[system][example] + words(16, 160))
        asks.append(Ask(prompt, choose.randint(8, 64)))
    return Workload("shared prefixes", asks)
