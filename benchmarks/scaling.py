"""Two ranks of one thread each against one: speed-ups, and whether the scaling model foresees them.

    python -m benchmarks.scaling --model model.gguf [--rounds 5] [-- FLAGS]

Both groups are up at the same time and take turns, as real rank processes without a broker: 8
prompts of 512 tokens, then decoding of 32 and of 64 sequences. The prediction (docs/SCALING.md)
takes the compute of each rank's shard, run alone, and the cost of the exchanges by size, each
measured by itself. FLAGS are those of a worker. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import collectives
from benchmarks.flags import worker_settings
from benchmarks.machine import load as machine_load
from benchmarks.machine import machine
from benchmarks.scaling_model import Load
from benchmarks.shard_compute import LoneShard, median_seconds
from benchmarks.tables import say
from gpu_worker.kernels import library as kernels
from gpu_worker.models.config import ModelConfig
from gpu_worker.rank_group import RankGroup, open_ranks
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import AddRequests, StepOutput
from gpu_worker.service import rank_options
from service import logs
from wire.ids import RequestId, token_ids
from wire.messages import Assignment
from wire.sampling import SamplingParams

SIZES = (1, 2)
PREFILL = Load("prefill 8 x 512", 8, 512, 512)
DECODES = (Load("decode 32", 32, 1, 144), Load("decode 64", 64, 1, 144))
_PROMPT_LEN = 128
"""Of a sequence whose decoding is measured, over contexts of 129 to 160 tokens."""

_NUM_DECODED = 32
_STEP_LEN = 1024
"""Tokens of the step that stands for all of a prefill, where no flag says how many it has."""

_LOAD_TIMEOUT_S = 120.0


@dataclass
class Contender:
    """A group of ranks, and the seconds per step (decode) or for all (prefill) by load."""

    size: int
    group: RankGroup
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_runs: int = 0

    async def run(self, load: Load, rng: random.Random) -> None:
        """Let the group do it once, and note how long it took."""
        self.num_runs += 1
        is_prefill = load.num_new > 1
        length = load.num_new if is_prefill else _PROMPT_LEN
        requests = [
            self._request(i, [rng.randrange(1000) for _ in range(length)], is_prefill)
            for i in range(load.num_seqs)
        ]
        seconds = await self._time(requests, is_prefill)
        self.seconds.setdefault(load.name, []).append(seconds)

    async def _time(self, requests: Sequence[Assignment], is_prefill: bool) -> float:
        started_s = time.perf_counter()
        await self.group.send(AddRequests(tuple(requests)))
        num_running = len(requests)
        decode_times: list[float] = []
        while num_running:
            step = await self.group.receive()
            if not isinstance(step, StepOutput):
                continue
            if step.stats.num_step_tokens == len(requests):
                decode_times.append(time.perf_counter())
            for output in step.outputs:
                assert output.error is None, output.error
                num_running -= output.finish_reason is not None
        if is_prefill:
            return time.perf_counter() - started_s
        # From the end of one step to the end of the next one: what lies between them counts.
        return statistics.median(b - a for a, b in itertools.pairwise(decode_times))

    def _request(self, number: int, prompt: list[int], is_prefill: bool) -> Assignment:
        num_tokens = 1 if is_prefill else _NUM_DECODED
        return Assignment(
            request_id=RequestId(f"{self.num_runs}-{number}"),
            fence=1,
            prompt_token_ids=token_ids(prompt),
            sampling=SamplingParams(
                max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, temperature=0.0
            ),
            stream=False,
            cache_salt=self.num_runs.to_bytes(16, "big"),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds that a step of `load` takes on one rank and on two, engine left out."""

    load: Load
    alone_s: float
    shards_s: tuple[float, ...]
    exchanges_s: float

    @property
    def speedup(self) -> float:
        """The ranks wait for the slowest of them."""
        return self.alone_s / (max(self.shards_s) + self.exchanges_s)


async def measure(options: RankOptions, num_rounds: int) -> list[Contender]:
    """All loads on both groups, in turns; the first round warms up."""
    rng = random.Random(1)
    async with AsyncExitStack() as stack:
        contenders = []
        for size in SIZES:
            group = await stack.enter_async_context(open_ranks(options, size))
            await group.wait_ready(_LOAD_TIMEOUT_S)
            contenders.append(Contender(size, group))
        for load in (PREFILL, *DECODES):
            for i in range(num_rounds + 1):
                for contender in contenders if i % 2 else reversed(contenders):
                    await contender.run(load, rng)
            for contender in contenders:
                del contender.seconds[load.name][0]
            medians = [statistics.median(c.seconds[load.name]) * 1e3 for c in contenders]
            say(f"{load.name}: {' '.join(f'{ms:.1f}' for ms in medians)} ms{machine_load()}")
    return contenders


def predict(
    options: RankOptions, exchanges: collectives.Measured, num_rounds: int
) -> list[Prediction]:
    """What shards that run alone and exchanges that are measured alone come to."""
    torch.set_num_threads(1)
    kernels.set_num_threads(1)
    alone, *shards = (LoneShard(options, rank, size) for size in SIZES for rank in range(size))
    cost = exchanges.cost()
    predictions = []
    for load in (_one_step(PREFILL, options.max_num_batched_tokens or _STEP_LEN), *DECODES):
        alone_s, *shards_s = median_seconds([alone, *shards], load, num_rounds=num_rounds)
        exchanges_s = _num_exchanges(alone.config) * cost.seconds(
            load.num_tokens * alone.config.hidden_size * 4
        )
        # The other rank's columns of the logits travel as the values of an all-reduce do.
        num_logits = load.num_seqs * alone.config.vocab_size // 2
        exchanges_s += exchanges.plan_s[collectives.SHARED] + cost.seconds(num_logits * 4)
        predictions.append(Prediction(load, alone_s, tuple(shards_s), exchanges_s))
    return predictions


def _one_step(load: Load, budget: int) -> Load:
    """A prefill step as the engine cuts it, with the mean context of all of them."""
    num_seqs = max(1, min(load.num_seqs, budget // load.num_new))
    return replace(load, num_seqs=num_seqs)


def _num_exchanges(config: ModelConfig) -> int:
    """All-reduces of a step: of the embedding, and two in each layer."""
    return 1 + 2 * config.num_layers


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags of a worker, after --")
    arguments = parser.parse_args()
    logs.configure(level="warning", log_format="json", service="benchmark")
    words = ["--threads", "1", "--model", arguments.model, "--log-level", "warning"]
    settings, _ = worker_settings([*words, *arguments.flags])
    options = rank_options(settings)
    exchanges = collectives.measure()
    contenders = asyncio.run(measure(options, arguments.rounds))
    predictions = predict(options, exchanges, arguments.rounds)
    _print(_report(contenders, predictions), exchanges, arguments)


def _report(
    contenders: Sequence[Contender], predictions: Sequence[Prediction]
) -> list[dict[str, Any]]:
    one, two = contenders
    rows = []
    for prediction in predictions:
        name = prediction.load.name
        ratios = [a / b for a, b in zip(one.seconds[name], two.seconds[name], strict=True)]
        rows.append(
            {
                "load": name,
                "tp1_s": statistics.median(one.seconds[name]),
                "tp2_s": statistics.median(two.seconds[name]),
                "speedup": statistics.median(ratios),
                "speedup_min_max": [min(ratios), max(ratios)],
                "predicted_speedup": prediction.speedup,
                "step_alone_s": prediction.alone_s,
                "step_shards_s": list(prediction.shards_s),
                "step_exchanges_s": prediction.exchanges_s,
            }
        )
    return rows


def _print(
    rows: Sequence[dict[str, Any]],
    exchanges: collectives.Measured,
    arguments: argparse.Namespace,
) -> None:
    print(
        f"{'load':18} {'TP=1, ms':>9} {'TP=2, ms':>9} {'speed-up':>8} {'(min-max)':>12} "
        f"{'predicted':>9}   {'one rank':>8} {'shards':>15} {'exchanges, ms':>13}"
    )
    for row in rows:
        low, high = row["speedup_min_max"]
        shards = " ".join(f"{s * 1e3:7.2f}" for s in row["step_shards_s"])
        print(
            f"{row['load']:18} {row['tp1_s'] * 1e3:9.2f} {row['tp2_s'] * 1e3:9.2f} "
            f"{row['speedup']:8.2f} {f'({low:.2f}-{high:.2f})':>12} "
            f"{row['predicted_speedup']:9.2f}   {row['step_alone_s'] * 1e3:8.2f} {shards} "
            f"{row['step_exchanges_s'] * 1e3:13.2f}"
        )
    report = {
        "benchmark": "scaling",
        "machine": machine(),
        "cpu_kernels": kernels.isa(),
        "model": arguments.model.rpartition("/")[2],
        "flags": arguments.flags,
        "rounds": arguments.rounds,
        "loads": rows,
        "all_reduce_s": exchanges.all_reduce_s,
        "plan_s": exchanges.plan_s,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
