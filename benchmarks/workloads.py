"""The workloads that engines are compared on: token ids in, greedy, output lengths exact.

    python -m benchmarks.workloads --model model.gguf --out DIR [--seed 1]

- `mixed`: 128 chats. Prompt lengths are log-normal with a median of 110 tokens, clipped to 16..512;
  output lengths are uniform in 16..192.
- `shared_prefix`: 96 chats in 4 groups, in random order. A group shares its first 1,024 tokens;
  questions have 32..64 tokens of their own, answers 32.
- `prefill`: 32 chats of 900 tokens that differ from the start; answers have 8.
- `warmup`: 8 small chats from another sequence of random numbers, to be run before any timing.

The model's tokenizer and chat template and the seed decide every token. Prompts are cut to their
length in tokens, so an engine that takes token ids does exactly the same work as any other. The
files are OpenAI batch rows (`NAME.ids.jsonl`), which `forebay run-batch` takes as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chat_frame import ChatFrame
from benchmarks.prose import Prose
from gpu_worker.models.card import load_model_card
from wire.messages import ModelCard

TIMED = ("mixed", "shared_prefix", "prefill")
WARM_UP = "warmup"
SUFFIX = ".ids.jsonl"

_MIXED_MEDIAN, _MIXED_SIGMA = 110, 0.85
_SHORT_PROMPT = 48
"""Below this many tokens a prompt has no room for a system message."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request: `num_output_tokens` are generated, whatever they are."""

    custom_id: str
    prompt: tuple[int, ...]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all submitted at once."""

    name: str
    rows: tuple[Row, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Over all requests."""
        return sum(len(row.prompt) for row in self.rows)

    @property
    def num_output_tokens(self) -> int:
        """Over all requests."""
        return sum(row.num_output_tokens for row in self.rows)


def generate(card: ModelCard, seed: int) -> dict[str, Workload]:
    """All workloads by name, for the model that `card` describes."""
    frame = ChatFrame(card)
    build = {"mixed": _mixed, "shared_prefix": _shared_prefix, "prefill": _prefill}
    workloads = {WARM_UP: _warm_up(frame, random.Random(f"{WARM_UP} {seed}"))}
    for name in TIMED:
        workloads[name] = build[name](frame, random.Random(f"{name} {seed}"))
    return workloads


def _mixed(frame: ChatFrame, rng: random.Random) -> Workload:
    prose = Prose(rng)
    chats = []
    for _ in range(128):
        drawn = round(rng.lognormvariate(math.log(_MIXED_MEDIAN), _MIXED_SIGMA))
        num_tokens = min(512, max(16, drawn))
        system = "" if num_tokens < _SHORT_PROMPT else "You answer briefly, in plain words."
        opening = frame.system(system)
        turn = frame.user(prose.text(num_tokens), num_tokens=num_tokens - len(opening))
        chats.append((opening + turn, rng.randint(16, 192)))
    return _workload("mixed", chats)


def _shared_prefix(frame: ChatFrame, rng: random.Random) -> Workload:
    prose = Prose(rng)
    chats = []
    for _ in range(4):
        manual = f"{prose.person()} relies on these notes. {prose.text(1024)}"
        opening = frame.system(manual, num_tokens=1024)
        for _ in range(24):
            turn = frame.user(prose.text(64), num_tokens=rng.randint(32, 64))
            chats.append((opening + turn, 32))
    rng.shuffle(chats)
    return _workload("shared_prefix", chats)


def _prefill(frame: ChatFrame, rng: random.Random) -> Workload:
    prose = Prose(rng)
    chats = []
    for number in rng.sample(range(1000, 10_000), 32):
        opening = frame.system(f"{number} is the number of this case.")
        turn = frame.user(prose.text(900), num_tokens=900 - len(opening))
        chats.append((opening + turn, 8))
    return _workload("prefill", chats)


def _warm_up(frame: ChatFrame, rng: random.Random) -> Workload:
    prose = Prose(rng)
    chats = []
    for i in range(8):
        opening = frame.system(f"Trial {i}.")
        chats.append((opening + frame.user(prose.text(16 + 48 * i)), 8 + 4 * i))
    return _workload(WARM_UP, chats)


def _workload(name: str, chats: Sequence[tuple[Sequence[int], int]]) -> Workload:
    return Workload(
        name,
        tuple(
            Row(f"{name}-{i:04}", tuple(prompt), num_output_tokens)
            for i, (prompt, num_output_tokens) in enumerate(chats)
        ),
    )


def write_workload(workload: Workload, path: Path, model: str | None = None) -> None:
    """Write batch rows that ask for exactly `num_output_tokens` greedy tokens each."""
    named = {} if model is None else {"model": model}
    with path.open("w") as file:
        for row in workload.rows:
            num_tokens = row.num_output_tokens
            length = {"max_tokens": num_tokens, "min_tokens": num_tokens, "ignore_eos": True}
            body = {**named, "prompt": row.prompt, **length, "temperature": 0}
            request = {"custom_id": row.custom_id, "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**request, "body": body}) + "\n")


def read_workload(path: Path) -> Workload:
    """The requests of a file of batch rows with token-id prompts; their lengths become exact."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        body = row["body"]
        if not isinstance(body["prompt"], list):
            raise ValueError(f"{path}: the prompt of {row['custom_id']} is not a list of token ids")
        rows.append(Row(row["custom_id"], tuple(body["prompt"]), int(body["max_tokens"])))
    return Workload(path.name.removesuffix(SUFFIX), tuple(rows))


def load_workloads(model: Path, seed: int, work: Path | None) -> dict[str, Workload]:
    """Those in the directory `work` if one is given, else newly generated ones."""
    if work is not None:
        return {name: read_workload(work / f"{name}{SUFFIX}") for name in (WARM_UP, *TIMED)}
    card = load_model_card(model, name=None, block_size=16, max_model_len=None)
    return generate(card, seed)


def main() -> None:
    """Write the files, and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for workload in load_workloads(arguments.model, arguments.seed, None).values():
        path = arguments.out / f"{workload.name}{SUFFIX}"
        write_workload(workload, path)
        lengths = [len(row.prompt) for row in workload.rows]
        report = {
            "workload": workload.name,
            "num_requests": len(workload.rows),
            "num_prompt_tokens": workload.num_prompt_tokens,
            "num_output_tokens": workload.num_output_tokens,
            "prompt_min_median_max": [min(lengths), statistics.median(lengths), max(lengths)],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
