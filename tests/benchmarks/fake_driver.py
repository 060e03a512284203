"""A contender that computes nothing: speaks the channel's language as a peer's script does.

It answers with `--first-token` and then counts up; `--fail` makes it end in an error when it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))

from channel import Channel, fail, versions  # type: ignore[import-not-found, unused-ignore]


class Counter:
    """Counts up, and prints, as libraries do, to the stream that is none of theirs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = vars(arguments)
        self._arguments = arguments

    def prepare(self, requests: list[Any]) -> None:
        print("a library's log line")

    def run(self, requests: list[Any]) -> list[list[int]]:
        if self._arguments.fail:
            raise RuntimeError("out of luck")
        time.sleep(self._arguments.run_s)
        first = self._arguments.first_token
        surplus = self._arguments.surplus
        return [list(range(first, first + r.num_tokens + surplus)) for r in requests]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--run-s", type=float, default=0.0)
    parser.add_argument("--first-token", type=int, default=5)
    parser.add_argument("--surplus", type=int, default=0)
    parser.add_argument("--fail", action="store_true")
    channel = Channel()
    try:
        channel.serve(Counter(parser.parse_args()), versions("no-such-package"))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
