"""What narrower numbers cost in quality: a candidate format against float32, side by side.

    python -m benchmarks.quality --model model.gguf --quantization int8 [--dtype auto] [--gate]

Both run in our own engine's model runner, on the same tokens:

- over real text (Python's language reference and source code, or --text FILE), with every token
  given: perplexity of both, the mean KL divergence of the candidate's distributions from the
  reference's, and how often both like the same token best;
- on the chats of the `mixed` workload, for several seeds: how often the first token of the greedy
  answer is the same, and the share of tokens before the first that differs.

Prints a table and one line of JSON. Logits are compared a few rows at a time and thrown away;
memory is that of the two models and a few hundred MiB. With --gate, the exit status is 1 unless
perplexity is within 1% and, for every seed, at least 95% of first tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from tokenizers import Tokenizer

from benchmarks.agreement import agreement
from benchmarks.machine import machine
from benchmarks.quality_measures import LogitComparison
from benchmarks.quality_text import windows
from benchmarks.tables import print_table
from benchmarks.teacher_forcing import blocks_for, continue_greedily, text_logits
from benchmarks.workloads import Row, load_workloads
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.card import load_model_card
from gpu_worker.tensor_parallel import TensorParallelGroup
from service.settings import Quantization

BLOCK_SIZE = 16
CHUNK_LEN = 64
"""Rows of logits at a time: 13 MB a model with a vocabulary of 49,152, 33 MB with one of 128k."""
MIN_FIRST_TOKENS, MAX_PERPLEXITY_CHANGE = 0.95, 0.01


@dataclass(frozen=True, slots=True)
class Pair:
    """The two formats of one model."""

    reference: ModelRunner
    candidate: ModelRunner


def main() -> None:
    """Measure, print a table and one line of JSON, and judge if asked to."""
    arguments = _arguments()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    prompts = {
        seed: load_workloads(arguments.model, seed, arguments.work)["mixed"].rows[
            : arguments.num_prompts
        ]
        for seed in seeds
    }
    pair = _load_pair(arguments, [row for rows in prompts.values() for row in rows])
    log = structlog.get_logger(__name__)
    started_s = time.monotonic()
    text = compare_text(pair, _text(arguments))
    log.info("text_compared", num_tokens=text["num_tokens"])
    answers = []
    for seed, rows in prompts.items():
        shares = compare_prompts(pair, rows, arguments.num_tokens, arguments.batch)
        answers.append({"seed": seed, **shares})
        log.info("answers_compared", seed=seed, num_prompts=len(rows))
    report: dict[str, Any] = {
        "benchmark": "quality",
        "machine": machine(),
        "model": arguments.model.name,
        "reference": pair.reference.precision.name,
        "candidate": pair.candidate.precision.name,
        "isa": pair.candidate.precision.isa,
        "text": text,
        "prompts": answers,
        "measuring_s": round(time.monotonic() - started_s, 1),
    }
    report["passed"] = passes(report)
    print_report(report)
    print(json.dumps(report))
    if arguments.gate and not report["passed"]:
        sys.exit(1)


def compare_text(pair: Pair, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Perplexities, KL divergence and agreement over `texts`, every token given."""
    sums = LogitComparison()
    for token_ids in texts:
        both = zip(
            text_logits(pair.reference, token_ids, CHUNK_LEN),
            text_logits(pair.candidate, token_ids, CHUNK_LEN),
            strict=True,
        )
        for index, (reference, candidate) in enumerate(both):
            first = index * CHUNK_LEN + 1
            sums.add(reference, candidate, torch.tensor(token_ids[first : first + CHUNK_LEN]))
    return {
        "num_tokens": sums.num_positions,
        "reference_perplexity": sums.reference_perplexity,
        "perplexity": sums.candidate_perplexity,
        "perplexity_change": sums.perplexity_change,
        "mean_kl": sums.mean_kl,
        "top_agreement": sums.top_agreement,
    }


def compare_prompts(
    pair: Pair, rows: Sequence[Row], num_tokens: int, batch: int
) -> dict[str, float]:
    """First and leading tokens of the greedy answers to `rows`, `batch` of them at a time."""
    sums = LogitComparison()
    expected: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        prompts = [row.prompt for row in some]
        references = continue_greedily(pair.reference, prompts, num_tokens)
        candidates = continue_greedily(pair.candidate, prompts, num_tokens)
        for row, reference, candidate in zip(some, references, candidates, strict=True):
            expected[row.custom_id] = reference.token_ids
            got[row.custom_id] = candidate.token_ids
            sums.add(reference.first_logits[None], candidate.first_logits[None], None)
    shares = agreement(expected, got)
    assert shares is not None
    return {
        "num_prompts": len(rows),
        "num_tokens": num_tokens,
        "first_token": shares.first_token,
        "leading_tokens": shares.leading_tokens,
        "identical": shares.identical,
        "first_token_kl": sums.mean_kl,
    }


def passes(report: dict[str, Any]) -> bool:
    """Whether the candidate is as good as `--quantization` promises."""
    return abs(report["text"]["perplexity_change"]) <= MAX_PERPLEXITY_CHANGE and all(
        seed["first_token"] >= MIN_FIRST_TOKENS for seed in report["prompts"]
    )


def print_report(report: dict[str, Any]) -> None:
    """The figures, for people."""
    text = report["text"]
    print(f"{report['model']}: {report['candidate']} against {report['reference']}")
    print_table(
        ["text tokens", "perplexity", "reference", "change", "mean KL", "same best token"],
        [
            [
                f"{text['num_tokens']}",
                f"{text['perplexity']:.4f}",
                f"{text['reference_perplexity']:.4f}",
                f"{text['perplexity_change']:+.3%}",
                f"{text['mean_kl']:.6f}",
                f"{text['top_agreement']:.2%}",
            ]
        ],
    )
    print_table(
        ["seed", "prompts", "same first token", "leading tokens", "identical", "first token's KL"],
        [
            [
                f"{seed['seed']}",
                f"{seed['num_prompts']}",
                f"{seed['first_token']:.1%}",
                f"{seed['leading_tokens']:.1%} of {seed['num_tokens']}",
                f"{seed['identical']:.1%}",
                f"{seed['first_token_kl']:.6f}",
            ]
            for seed in report["prompts"]
        ],
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto", help="of the candidate")
    parser.add_argument("--quantization", default="none", help="of the candidate")
    parser.add_argument("--reference", default="float32", help="dtype to compare with")
    parser.add_argument("--text", type=Path, help="a text file, instead of Python's own texts")
    parser.add_argument("--text-tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512, help="tokens of text with one context")
    parser.add_argument("--seeds", default="1,2,3", help="of the chats, with commas between")
    parser.add_argument("--work", type=Path, help="a directory with mixed.ids.jsonl, for one seed")
    parser.add_argument("--num-prompts", type=int, default=128, help="of each seed")
    parser.add_argument("--num-tokens", type=int, default=16, help="to answer with")
    parser.add_argument("--batch", type=int, default=32, help="prompts answered together")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if the candidate is bad")
    return parser.parse_args()


def _load_pair(arguments: argparse.Namespace, rows: Sequence[Row]) -> Pair:
    longest = max(len(row.prompt) for row in rows) + arguments.num_tokens
    num_blocks = max(
        arguments.batch * blocks_for(longest, BLOCK_SIZE), blocks_for(arguments.window, BLOCK_SIZE)
    )

    def load(dtype: str, quantization: Quantization) -> ModelRunner:
        return ModelRunner(
            arguments.model,
            group=TensorParallelGroup.single(),
            dtype=dtype,
            quantization=quantization,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
        )

    return Pair(load(arguments.reference, "none"), load(arguments.dtype, arguments.quantization))


def _text(arguments: argparse.Namespace) -> list[list[int]]:
    card = load_model_card(arguments.model, name=None, block_size=BLOCK_SIZE, max_model_len=None)
    return windows(
        Tokenizer.from_str(card.tokenizer_json.decode()),
        arguments.text,
        num_tokens=arguments.text_tokens,
        window=arguments.window,
    )


if __name__ == "__main__":
    main()
