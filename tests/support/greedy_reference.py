"""The numerical reference: greedy tokens checked against `transformers` in float32.

Instead of generating with the reference token by token, its logits are computed once over prompt
and answer together: the answer is the reference's greedy one if and only if every one of its tokens
is the most likely after those before it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TIE = 1e-4
"""Two logits closer than this are a tie, which summation order may break either way."""


@dataclass(frozen=True, slots=True)
class Tie:
    """A position where the answer took one of two equally likely tokens, and the reference the
    other.
    """

    position: int
    taken: int
    preferred: int
    gap: float


def load_reference(directory: Path, gguf_file: str | None = None) -> Any:
    """A `transformers` causal model in float32, read from the disk alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        # Deprecations inside transformers and what it imports are not ours to fix.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf_file, dtype=torch.float32
        )
    return model.eval()


@torch.inference_mode()
def reference_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """(len(token_ids), vocab_size) float32."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0].float()
    return logits


def assert_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[Tie]:
    """Assert that `answer` is the reference's greedy continuation; returns the ties in it."""
    logits = reference_logits(model, [*prompt, *answer])
    ties = []
    for position, token_id in enumerate(answer):
        row = logits[len(prompt) + position - 1]
        preferred = int(row.argmax())
        if preferred == token_id:
            continue
        gap = float(row[preferred] - row[token_id])
        assert gap <= TIE, (
            f"token {position} of the answer is {token_id}; the reference prefers {preferred} "
            f"by {gap:.6f}, which is more than a tie of {TIE}"
        )
        ties.append(Tie(position, token_id, preferred, gap))
    return ties
