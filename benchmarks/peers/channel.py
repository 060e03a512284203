"""How a contender talks to the benchmark: JSON lines on what were its standard streams.

Needs nothing but Python, since it runs under the peers' own interpreters. The conversation:

    -> (the process starts)         <- {"ready": {"settings": {...}, "versions": {...}}}
    -> {"prepare": FILE}            <- {"prepared": number of requests}
    -> {"run": true}                <- {"wall_s": seconds}
    -> {"outputs": true}            <- {"outputs": {custom_id: [token ids]}}
    -> (end of file)                   (the process ends)

`prepare` reads the requests and empties all caches, untimed; `run` submits all of them at once and
returns when the last is done; `outputs` hands out what the last run generated. Whatever goes wrong
is one line {"error": text}, and the end of the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from typing import Any, Protocol


class Request:
    """What is asked of an engine: continue `prompt` greedily by exactly `num_tokens` tokens."""

    def __init__(self, custom_id: str, prompt: list[int], num_tokens: int) -> None:
        self.custom_id = custom_id
        self.prompt = prompt
        self.num_tokens = num_tokens


class Engine(Protocol):
    """What a driver provides."""

    settings: dict[str, Any]

    def prepare(self, requests: list[Request]) -> None:
        """Forget every earlier prompt."""

    def run(self, requests: list[Request]) -> list[list[int]]:
        """The generated tokens of each request, in order."""


class Channel:
    """The two streams of the conversation. Open it first: what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._input = os.fdopen(os.dup(0), "r")
        self._output = os.fdopen(os.dup(1), "w")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any] | None:
        """The next order, None when there will be no more."""
        line = self._input.readline()
        return json.loads(line) if line else None

    def send(self, message: dict[str, Any]) -> None:
        """Answer."""
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()

    def serve(self, engine: Engine, versions: dict[str, str]) -> None:
        """Obey until the end of the input."""
        self.send({"ready": {"settings": engine.settings, "versions": versions}})
        requests: list[Request] = []
        outputs: list[list[int]] = []
        while (order := self.receive()) is not None:
            if "prepare" in order:
                requests = read_requests(order["prepare"])
                engine.prepare(requests)
                self.send({"prepared": len(requests)})
            elif "run" in order:
                started_s = time.perf_counter()
                outputs = engine.run(requests)
                self.send({"wall_s": time.perf_counter() - started_s})
            elif "outputs" in order:
                pairs = zip(requests, outputs, strict=True)
                self.send({"outputs": {r.custom_id: [*map(int, o)] for r, o in pairs}})
            else:
                raise ValueError(f"unknown order {order}")


def read_requests(path: str) -> list[Request]:
    """The requests of a file of OpenAI batch rows whose prompts are token ids."""
    requests = []
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            body = row["body"]
            requests.append(Request(row["custom_id"], body["prompt"], body["max_tokens"]))
    return requests


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of `packages`, and Python's."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fail(channel: Channel, error: BaseException) -> None:
    """Tell why the process ends."""
    channel.send({"error": f"{type(error).__name__}: {error}"[:2000]})
