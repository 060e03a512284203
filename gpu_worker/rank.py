r"""One rank of a worker group, as a process of its own.

    python -m gpu_worker.rank --parent-pid 7 --rank 0 --size 2 --rendezvous FILE \
        --socket-fd 5 --options JSON

Rank 0 leads: it takes requests from the orchestrator's socket (`gpu_worker.rank_protocol`), steps
the engine, gives every step's plan to the other ranks, and reports what came out. The others follow
its plans until it ends.

A rank never outlives its orchestrator: the kernel kills it when its parent dies (Linux), and rank 0
also takes the end of its socket for an order to exit. Signals meant for the whole terminal or
service (SIGINT, SIGTERM) are left to the orchestrator, which drains or stops its ranks by a frame
and ends by SIGKILL those that do not obey.

Exit status: 0 after Stop or the orchestrator's end; 1 after an error, which rank 0 reports
in a RankError frame and every rank in its log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from gpu_worker.idle_check import IdleCheck
from gpu_worker.layer_progress import LayerCounter, ProgressReporter
from gpu_worker.quick_imports import quick_imports
from gpu_worker.rank_options import STUB_MODEL_PATH, RankOptions
from gpu_worker.rank_protocol import (
    AbortRequests,
    AddRequests,
    RankChannel,
    RankError,
    RankReady,
    StepOutput,
    Stop,
)
from service import logs
from service.die_with_parent import die_with_parent
from wire.errors import ForebayError
from wire.ids import RequestId
from wire.messages import Assignment


class ServedEngine(Protocol):
    """What `serve` needs of an engine: the real one, or the stub."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    cache_format: str

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, assignment: Assignment) -> None:
        """Queue a request."""

    def abort(self, request_id: RequestId) -> None:
        """Drop a request."""

    def step(self) -> StepOutput:
        """Compute one step."""

    def check_integrity(self) -> None:
        """Raise AssertionError if its bookkeeping contradicts itself."""


def serve(channel: RankChannel, engine: ServedEngine) -> None:
    """Run requests until told to stop. Raises EOFError or OSError when the orchestrator is gone.

    Also raises AssertionError when the engine is found to be inconsistent, so that the group starts
    again with an empty cache instead of giving wrong answers.
    """
    idle_check = IdleCheck(engine.check_integrity)
    while True:
        has_aborted = False
        for frame in channel.receive(wait=not engine.has_work):
            match frame:
                case AddRequests(assignments):
                    for assignment in assignments:
                        engine.add(assignment)
                case AbortRequests(request_ids):
                    has_aborted = True
                    for request_id in request_ids:
                        engine.abort(request_id)
                case Stop():
                    return
        # A step without work computes nothing, but its figures tell what the abort has freed.
        if engine.has_work or has_aborted:
            channel.send(engine.step())
            if not engine.has_work:
                idle_check.run()


def lead(channel: RankChannel, size: int, rendezvous: Path, options: RankOptions) -> None:
    """Be rank 0: load, say so, serve; then release the other ranks."""
    started_s = time.perf_counter()
    layers = LayerCounter()
    reporter = ProgressReporter(channel, layers, options.progress_interval_s)
    if options.model_path == STUB_MODEL_PATH:
        from gpu_worker.engine.stub import StubEngine

        _serve_when_ready(channel, StubEngine(options, layers), reporter, started_s)
        return

    # Not at the top: the stub runs without torch, which takes a second to load.
    with quick_imports():
        from gpu_worker.engine.sharded import ShardedEngine

    with ShardedEngine(size, rendezvous, options, layers) as engine:
        _serve_when_ready(channel, engine, reporter, started_s)


def _serve_when_ready(
    channel: RankChannel, engine: ServedEngine, reporter: ProgressReporter, started_s: float
) -> None:
    channel.send(
        RankReady(
            num_blocks=engine.num_blocks,
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            load_s=time.perf_counter() - started_s,
            cache_format=engine.cache_format,
        )
    )
    with reporter:
        serve(channel, engine)


def main(argv: list[str] | None = None) -> int:
    """Run the rank that the command line describes; returns its exit status."""
    arguments = _parse(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(arguments.parent_pid)
    options = RankOptions.from_json(arguments.options)
    service = f"rank-{arguments.rank}"
    logs.configure(level=options.log_level, log_format=options.log_format, service=service)
    if arguments.rank == 0:
        with socket.socket(fileno=arguments.socket_fd) as sock:
            channel = RankChannel(sock)
            return _run(
                lambda: lead(channel, arguments.size, arguments.rendezvous, options), channel
            )

    with quick_imports():
        from gpu_worker.engine.sharded import follow

    return _run(lambda: follow(arguments.rank, arguments.size, arguments.rendezvous, options), None)


def _run(body: Callable[[], None], channel: RankChannel | None) -> int:
    """The process's edge: whatever ends `body`, the log and the orchestrator get to know."""
    log = structlog.get_logger(__name__)
    try:
        body()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.warning("orchestrator_gone")
    except ForebayError as error:
        log.error("rank_failed", code=error.code, error=str(error))
        return _report(channel, RankError(error.code, str(error)))
    except Exception as error:
        log.exception("rank_failed")
        return _report(channel, RankError(_code(error), _one_line(error)))
    return 0


def _report(channel: RankChannel | None, frame: RankError) -> int:
    if channel is not None:
        with contextlib.suppress(OSError):  # the orchestrator is gone, but the log has it
            channel.send(frame)
    return 1


def _code(error: Exception) -> str:
    # torch's class is known by its name, as torch may not be loaded.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return "out_of_memory" if out_of_memory else "engine_failed"


def _one_line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_worker.rank", description="One rank of a group.")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--socket-fd", type=int)
    parser.add_argument("--options", required=True)
    arguments = parser.parse_args(argv)
    if (arguments.rank == 0) != (arguments.socket_fd is not None):
        parser.error("rank 0, and only rank 0, is given a socket")
    return arguments


if __name__ == "__main__":
    # Not sys.exit: threads of a collective that will never end must not hold the process back.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
