"""Who takes part in a comparison: Forebay in two forms, and its peers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.drivers import Driver
from benchmarks.peer_environments import PEERS

PIPELINE = "pipeline"
BARE = "bare"

_MODULES = {PIPELINE: "benchmarks.pipeline_driver", BARE: "benchmarks.engine_driver"}


def ours(kind: str, words: Sequence[str]) -> Driver:
    """Forebay's whole pipeline, or its engine alone; `words` are flags of a worker."""
    return Driver(kind, [sys.executable, "-m", _MODULES[kind], *words])


def peer_drivers(arguments: argparse.Namespace) -> list[Driver]:
    """One driver for each dtype of each peer. The n-th of each option belongs to the n-th peer.

    Raises ValueError when a peer lacks its interpreter or its model.
    """
    drivers: list[Driver] = []
    for i, name in enumerate(arguments.peer):
        peer = PEERS[name]
        python = _nth(arguments.peer_python, i)
        model = _nth(arguments.peer_model, i)
        if python is None or model is None:
            raise ValueError(f"{name} needs --peer-python and --peer-model; see --describe")
        # Not resolved: a link is what tells an interpreter its environment.
        interpreter = Path(python).expanduser().absolute()
        model_path = Path(model).expanduser().absolute()
        for path in (interpreter, model_path):
            if not path.exists():
                raise ValueError(f"{path} does not exist; see --peer {name} --describe")
        dtypes = _nth(arguments.peer_dtype, i)
        flags = shlex.split(_nth(arguments.peer_flags, i) or "")
        for dtype in dtypes.split(",") if dtypes else peer.dtypes:
            command = [str(interpreter), str(peer.driver), "--model", str(model_path)]
            drivers.append(
                Driver(
                    f"{name} {model_path.name} {dtype}",
                    [*command, "--dtype", dtype, *flags],
                    # Its own packages and no others: ours have names such as `cache`.
                    {"LD_PRELOAD": ":".join(peer.preloaded(interpreter)), "PYTHONPATH": ""},
                )
            )
    return drivers


def _nth(values: Sequence[str], index: int) -> str | None:
    return values[index] if index < len(values) else None
