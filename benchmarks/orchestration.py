"""What everything that is not the model costs: CPU time of each process, calls to the server.

    python -m benchmarks.orchestration [--requests 256] [--tokens 108] [--step-ms 50]

Brings up a whole pipeline as `forebay run-batch` does, with the stub engine in the model's place,
and runs a batch through it after a small one that warms it up; start-up and shut-down stay out.
The stub takes `--step-ms` for a step of up to `--concurrency` requests, as a model would, and
computes nothing, so what is left is the orchestration: broker, scheduler, the group's
orchestrator, the rank's end of the socket, and the command with its producer and its files.

Prints CPU seconds by process, per 1,000 requests and per 1,000 output tokens, and the server's
commands (those inside scripts included) and network reads per request; then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from benchmarks.machine import machine
from benchmarks.processes import cpu_seconds
from forebay.local import local_pipeline
from forebay.paths import run_directory
from producer import Producer
from producer.batch import BatchOptions, run_batch
from service.settings import LocalSettings

NUM_WARM_UP = 32
NUM_PROMPT_BYTES = 148
"""The stub has one token for each byte; the mixed workload's prompts have as many on average."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters at one moment: CPU seconds by kind of process, the server's by name."""

    wall_s: float
    cpu_s: dict[str, float]
    num_calls: dict[str, int]
    num_reads: int


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=108, help="output tokens of each request")
    parser.add_argument("--concurrency", type=int, default=128, help="requests in one step")
    parser.add_argument("--step-ms", type=float, default=50.0)
    arguments = parser.parse_args()
    before, after = asyncio.run(measure(arguments))
    report = summarize(arguments, before, after)
    print_table(report)
    print(json.dumps(report))


async def measure(arguments: argparse.Namespace) -> tuple[Snapshot, Snapshot]:
    """The counters before and after the batch."""
    worker_flags = {
        "model": f"stub:{arguments.step_ms:g}ms",
        "max_num_seqs": arguments.concurrency,
    }
    settings = LocalSettings.load()
    with run_directory() as directory:
        async with (
            local_pipeline(directory, settings=settings, worker_flags=worker_flags) as pipeline,
            Producer(pipeline.url) as producer,
            Redis.from_url(pipeline.url) as client,
        ):
            never = asyncio.Event()
            await pipeline.run(_run(producer, NUM_WARM_UP, 4), stop=never)
            before = await _snapshot(client)
            batch = _run(producer, arguments.requests, arguments.tokens)
            await pipeline.run(batch, stop=never)
            return before, await _snapshot(client)


async def _run(producer: Producer, num_requests: int, num_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(_row(index, num_tokens) for index in range(num_requests)))
        answers = Path(folder) / "answers.jsonl"
        summary = await run_batch(BatchOptions(str(rows), str(answers)), producer)
        assert summary.num_succeeded == num_requests, summary
        assert summary.num_output_tokens == num_requests * num_tokens, summary


def _row(index: int, num_tokens: int) -> str:
    body = {
        "prompt": f"{index:04} of as many as it takes ".ljust(NUM_PROMPT_BYTES, "-"),
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    row = {"custom_id": f"{index}", "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(row) + "\n"


async def _snapshot(client: Redis) -> Snapshot:
    statistics: Mapping[str, Any] = await client.info("commandstats")
    totals: Mapping[str, Any] = await client.info("stats")
    return Snapshot(
        wall_s=time.monotonic(),
        # The system counts in hundredths of a second, Python's own clock finer.
        cpu_s={**cpu_seconds(os.getpid()), "command": time.process_time()},
        num_calls={
            name.removeprefix("cmdstat_"): counts["calls"] for name, counts in statistics.items()
        },
        num_reads=totals["total_reads_processed"],
    )


def summarize(
    arguments: argparse.Namespace, before: Snapshot, after: Snapshot
) -> dict[str, object]:
    """The differences, by request and by token."""
    num_requests, num_tokens = arguments.requests, arguments.requests * arguments.tokens
    wall_s = after.wall_s - before.wall_s
    cpu_s = {kind: s - before.cpu_s.get(kind, 0.0) for kind, s in after.cpu_s.items()}
    # The rank is the model's own process; the stub in it, too, makes tokens one by one.
    total_s = sum(seconds for kind, seconds in cpu_s.items() if kind != "rank")
    calls = {
        name: (count - before.num_calls.get(name, 0)) / num_requests
        for name, count in after.num_calls.items()
    }
    return {
        "benchmark": "orchestration",
        "machine": machine(),
        "num_requests": num_requests,
        "num_output_tokens": num_tokens,
        "concurrency": arguments.concurrency,
        "step_ms": arguments.step_ms,
        "wall_s": round(wall_s, 3),
        "cpu_s": {kind: round(seconds, 3) for kind, seconds in sorted(cpu_s.items())},
        "cpu_s_without_rank": round(total_s, 3),
        "cpu_s_per_1000_requests": round(1000 * total_s / num_requests, 3),
        "cpu_s_per_1000_tokens": round(1000 * total_s / num_tokens, 4),
        "share_of_one_core": round(total_s / wall_s, 4),
        "server_reads_per_request": round((after.num_reads - before.num_reads) / num_requests, 2),
        "server_commands_per_request": {
            name: round(count, 2)
            for name, count in sorted(calls.items(), key=lambda item: -item[1])
            if count >= 0.01
        },
    }


def print_table(report: Mapping[str, Any]) -> None:
    """The report for people."""
    num_requests, num_tokens = report["num_requests"], report["num_output_tokens"]
    print(
        f"{num_requests} requests, {num_tokens} tokens, {report['concurrency']} at a time, "
        f"{report['step_ms']:g} ms a step: {report['wall_s']:.2f} s"
    )
    print(f"{'process':24} {'CPU s':>8} {'/1000 requests':>15} {'/1000 tokens':>13}")
    rows = {**report["cpu_s"], "all but the rank": report["cpu_s_without_rank"]}
    for kind, seconds in rows.items():
        print(
            f"{kind:24} {seconds:8.3f} {1000 * seconds / num_requests:15.3f} "
            f"{1000 * seconds / num_tokens:13.4f}"
        )
    print(f"share of one core: {100 * report['share_of_one_core']:.1f}%")
    commands = report["server_commands_per_request"]
    print(
        f"server: {sum(commands.values()):.1f} commands and "
        f"{report['server_reads_per_request']:.2f} reads per request"
    )
    print("  " + ", ".join(f"{name} {count:g}" for name, count in commands.items()))


if __name__ == "__main__":
    main()
