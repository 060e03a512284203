"""Forebay and other engines on the very same token ids, in turns, in one run.

    python -m benchmarks.compare --model model.gguf [--workload mixed,shared_prefix,prefill]
        --peer vllm --peer-python PEERS/vllm/bin/python --peer-model DIR [--peer-dtype float16,...]
        [--peer ... for more of them] [--peer-flags="..."] [--seed 1 | --work DIR] [--rounds 3]
        [--reference DIR] [--quantization int8 ...]
    python -m benchmarks.compare --peer vllm --describe

A peer runs at its best settings under its own Python (`--describe` says how to make one), once for
each of its dtypes; which of them is best the run itself shows. Forebay runs as the whole pipeline,
through the broker, from the first row read to the last row written. All processes stay up from
round to round, so start-up is not in the rounds but reported apart; prefix caches are empty at the
start of each.

Prints per workload medians with extremes, the ratio of Forebay's time to each peer's (below 1:
Forebay is faster), memory, and agreement with a reference if there is one; then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.agreement import agreement, read_reference
from benchmarks.arguments import (
    add_common_arguments,
    chosen_workloads,
    engine_words,
    workload_names,
)
from benchmarks.command import measure_workload
from benchmarks.contenders import PIPELINE, ours, peer_drivers
from benchmarks.drivers import Driver, DriverError
from benchmarks.peer_environments import PEERS
from benchmarks.report import header, title, workload_facts
from benchmarks.tables import print_table, seconds, shares
from benchmarks.turns import Scores, take_turns
from benchmarks.workloads import Workload


def main() -> None:
    """Compare, and print."""
    arguments, rest = _parse()
    if arguments.describe:
        for name in arguments.peer:
            print(f"{name}\n{PEERS[name].steps}")
        return
    try:
        report = compare(arguments, engine_words(arguments, rest))
    except (DriverError, ValueError) as error:
        sys.exit(f"error: {error}")
    print_report(report)
    print(json.dumps(report))


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Further flags go to Forebay's engine."
    )
    describing = "--describe" in sys.argv
    add_common_arguments(parser, required=not describing)
    add = parser.add_argument
    add("--peer", action="append", choices=sorted(PEERS), help="may be given several times")
    add("--peer-python", action="append", default=[], help="its interpreter, one for each peer")
    add("--peer-model", action="append", default=[], help="what it loads, one for each peer")
    add("--peer-dtype", action="append", default=[], help="some of its dtypes, with commas between")
    add("--peer-flags", action="append", default=[], help="further flags of its driver")
    add("--no-command", action="store_true", help="leave out the command with its start-up")
    add("--describe", action="store_true", help="say how to make the peers' environments")
    arguments, rest = parser.parse_known_args()
    arguments.peer = arguments.peer or (sorted(PEERS) if describing else [])
    if not arguments.peer:
        parser.error("name at least one --peer")
    return arguments, rest


def compare(arguments: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Everything that is printed."""
    names = workload_names(arguments)
    workloads = chosen_workloads(arguments)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = [stack.enter_context(driver) for driver in peer_drivers(arguments)]
        drivers = [stack.enter_context(ours(PIPELINE, words)), *peers]
        scores = take_turns(
            drivers, workloads, names, num_rounds=arguments.rounds, directory=directory
        )
        contenders = {driver.name: _about(driver) for driver in drivers}
    return {
        **header("compare", arguments, words[2:]),
        "contenders": contenders,
        "workloads": {
            name: _compared(workloads[name], scores, arguments.reference) for name in names
        },
        "command": None
        if arguments.no_command
        else _command(arguments, words[2:], workloads[names[0]], scores, contenders),
    }


def _about(driver: Driver) -> dict[str, Any]:
    return {
        "ready_after_s": round(driver.start_s, 2),
        "settings": dict(driver.settings),
        "versions": dict(driver.versions),
    }


def _compared(workload: Workload, scores: Scores, reference_path: Path | None) -> dict[str, Any]:
    reference = read_reference(reference_path, workload.name)
    by_contender = scores[workload.name]
    our_score = by_contender[PIPELINE]
    peers = {name: score for name, score in by_contender.items() if name != PIPELINE}
    fastest = min(peers, key=lambda name: peers[name].wall_s)
    our_outputs = our_score.rounds[-1].outputs
    with_fastest = agreement(peers[fastest].rounds[-1].outputs, our_outputs)
    assert with_fastest is not None, "both ran the same requests"
    return {
        **workload_facts(workload),
        **{name: score.report(workload, reference) for name, score in by_contender.items()},
        "ratio": {name: round(our_score.wall_s / s.wall_s, 3) for name, s in peers.items()},
        "fastest_peer": fastest,
        "memory_ratio": {
            name: round(our_score.peak_bytes / s.peak_bytes, 3) for name, s in peers.items()
        },
        "first_token_as_fastest_peer": round(with_fastest.first_token, 4),
    }


def _command(
    arguments: argparse.Namespace,
    flags: list[str],
    workload: Workload,
    scores: Scores,
    contenders: dict[str, Any],
) -> dict[str, Any]:
    """From the command to a finished file, against a peer's start and its median round.

    That favours the peer: its start ends when it is ready, and it writes no file.
    """
    figures = measure_workload(str(arguments.model), flags, workload, arguments.rounds)
    ratios = {}
    for name, score in scores[workload.name].items():
        if name != PIPELINE:
            peer_s = contenders[name]["ready_after_s"] + score.wall_s
            ratios[name] = round(figures["wall_s"] / peer_s, 3)
    return {"workload": workload.name, **figures, "ratio": ratios}


def print_report(report: dict[str, Any]) -> None:
    """The tables."""
    print(title(report))
    rows = []
    for name, of_workload in report["workloads"].items():
        for contender in report["contenders"]:
            figures = of_workload[contender]
            ratio = of_workload["ratio"].get(contender)
            rows.append(
                [
                    name,
                    contender,
                    seconds(figures),
                    "" if ratio is None else f"{ratio:.2f}",
                    f"{figures['output_tokens_per_s']}",
                    f"{figures['peak_mib']:.0f}",
                    shares(figures["agreement"]),
                ]
            )
    header = ["workload", "who", "seconds (min-max)", "ours/theirs", "out/s", "MiB", "agreement"]
    print_table(header, rows)
    ready = ", ".join(f"{n} {c['ready_after_s']:.1f} s" for n, c in report["contenders"].items())
    print(f"ready after: {ready}")
    command = report["command"]
    if command is not None:
        against = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in command["ratio"].items())
        print(
            f"from the command to a finished file ({command['workload']}): {seconds(command)} s, "
            f"{against}; {command['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
