"""The right answers: greedy tokens of transformers in float32, one request at a time.

    python make_reference.py --model HF_DIR --work DIR --out DIR [--draft DIR]
        [--workload mixed,shared_prefix,prefill]

Writes `NAME.json` (token ids by custom_id) and `NAME.margins.json` (for each token, how far its
logit lies above the second best). A draft, in the form of the former, is another engine's guess at
the answers: its tokens are checked all at once, and generation only takes over where one is wrong,
so a good draft makes this many times as fast and changes nothing in the result.

Not one reference decides near a tie: summation order may turn a margin below 1e-4 round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from channel import (  # type: ignore[import-not-found, unused-ignore]
    Request,
    read_requests,
)
from transformers import AutoModelForCausalLM, DynamicCache

_SHARED = 1024
"""Beginnings of this many tokens that several requests share are computed once."""


class Reference:
    """The model, and what it has computed of the beginning that the last request had."""

    def __init__(self, model_path: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self._beginning: list[int] = []
        self._cache: Any = None

    @torch.inference_mode()
    def answer(self, request: Request, draft: list[int]) -> tuple[list[int], list[float]]:
        """The greedy tokens, and their margins."""
        tokens: list[int] = []
        margins: list[float] = []
        cache, pending = self._begin(request.prompt)
        while len(tokens) < request.num_tokens:
            guess = [] if tokens else draft[: request.num_tokens - 1]
            best = self._logits(pending + guess, cache, len(guess) + 1).topk(2)
            for i, token in enumerate(best.indices[:, 0].tolist()):
                tokens.append(token)
                margins.append(float(best.values[i, 0] - best.values[i, 1]))
                if i < len(guess) and guess[i] != token:
                    cache.crop(i - len(guess))  # what follows continued another text
                    break
            pending = tokens[-1:]
        return tokens, margins

    def _begin(self, prompt: list[int]) -> tuple[Any, list[int]]:
        """A cache with the beginning of the prompt, and the rest of it."""
        if len(prompt) > _SHARED:
            return copy.deepcopy(self._shared(prompt[:_SHARED])), prompt[_SHARED:]
        return DynamicCache(config=self._model.config), prompt

    def _logits(self, token_ids: list[int], cache: Any, num_kept: int) -> torch.Tensor:
        """The last `num_kept` rows."""
        ids = torch.tensor([token_ids])
        result = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=num_kept)
        logits: torch.Tensor = result.logits[0]
        return logits

    def _shared(self, beginning: list[int]) -> Any:
        if beginning != self._beginning:
            self._cache = DynamicCache(config=self._model.config)
            ids = torch.tensor([beginning])
            self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._beginning = beginning
        return self._cache


def main() -> None:
    """Answer the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--workload", default="mixed,shared_prefix,prefill")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    reference = Reference(arguments.model)
    for name in arguments.workload.split(","):
        path = arguments.draft / f"{name}.json" if arguments.draft else None
        drafts = json.loads(path.read_text()) if path is not None and path.exists() else {}
        requests = read_requests(str(arguments.work / f"{name}.ids.jsonl"))
        requests.sort(key=lambda request: request.prompt[:_SHARED])
        answers, margins = {}, {}
        for request in requests:
            draft = drafts.get(request.custom_id, [])
            answers[request.custom_id], margins[request.custom_id] = reference.answer(
                request, draft
            )
        (arguments.out / f"{name}.json").write_text(json.dumps(answers))
        (arguments.out / f"{name}.margins.json").write_text(json.dumps(margins))
        right = sum(drafts.get(custom_id) == answer for custom_id, answer in answers.items())
        print(f"{name}: {len(answers)} answers, {right} of them as in the draft", flush=True)


if __name__ == "__main__":
    main()
