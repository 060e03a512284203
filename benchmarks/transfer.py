"""What blocks cost on their way from one process's host memory to another's.

    python -m benchmarks.transfer [--rounds 20] [--transport socket|mooncake]

The prefix is 1,024 tokens of a small model (30 layers, 3 key/value heads of 64, blocks of 16
tokens), in fp8 blocks with scales and in 16-bit ones, between two processes of one rank each. A
fetch is timed from before it connects until all blocks lie in the importer's slots, checked.

Then: the operations of which it is made, alone; what hashes cost here; and the time that a main
thread loses to a fetch that its process serves meanwhile, if it runs Python, and if it runs numpy,
beside what it loses to one that another process serves on the same cores.
Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import print_table
from cache.transfer.client import Lease, borrow, fetch_blocks
from cache.transfer.handshake import RankName
from cache.transfer.keys import TransferKeys
from cache.transfer.lending import Loan
from cache.transfer.messages import HASH_BYTES, LeaseRequest, RankSource
from cache.transfer.mooncake import MooncakeTransport
from cache.transfer.planning import blocks_per_run
from cache.transfer.server import BlockServer
from cache.transfer.slots import BlockLayout, HostSlots, digest
from cache.transfer.transport import SocketTransport, Transport
from service import logs
from wire.ids import GroupId

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_TOKENS = 30, 3, 64, 16, 1024
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
LAYOUTS = {
    "fp8": BlockLayout(2 * NUM_LAYERS, BLOCK_SIZE * HEAD_DIM, 2 * BLOCK_SIZE),
    "16-bit": BlockLayout(2 * NUM_LAYERS, 2 * BLOCK_SIZE * HEAD_DIM, 0),
}
TCP, UNIX = "TCP loopback", "Unix socket"

HASHES: dict[str, Callable[[bytes], bytes]] = {
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "HMAC-SHA256": lambda data: hmac.digest(bytes(32), data, "sha256"),
    "BLAKE2b, keyed": lambda data: hashlib.blake2b(data, key=bytes(32)).digest(),
    "BLAKE2s, keyed": lambda data: hashlib.blake2s(data, key=bytes(32)).digest(),
    "SHA-512": lambda data: hashlib.sha512(data).digest(),
    "SHA3-256": lambda data: hashlib.sha3_256(data).digest(),
}

_KEYS = TransferKeys.derive(bytes(32))
_EXPORTER, _IMPORTER = GroupId("exporter"), GroupId("importer")
_TIMEOUT_S = 30.0
_BUSY_S = 1.5
_NUM_BUSY_FETCHES = 8


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """Medians, and the fastest; `one_block_s` is a fetch of one block, `ask_s` asking for all."""

    fetch_s: float
    fastest_s: float
    one_block_s: float
    ask_s: float
    num_bytes: int


def main() -> None:
    """Measure all of it, or serve as the other process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--transport", choices=("socket", "mooncake"), default="socket")
    parser.add_argument("--serve", nargs=2, metavar=("FORMAT", "ADDRESS"), help=argparse.SUPPRESS)
    parser.add_argument("--busy", choices=tuple(_LOADS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logs.configure(level="error", log_format="json", service="benchmark")
    if arguments.serve is not None:
        format_name, address = arguments.serve
        _serve(format_name, address, arguments.transport, arguments.busy)
        return
    fetches = {
        f"{name}, {where}": _measure_fetches(name, where, arguments.transport, arguments.rounds)
        for name in LAYOUTS
        for where in (UNIX, TCP)
    }
    parts = {name: _measure_parts(layout, arguments.rounds) for name, layout in LAYOUTS.items()}
    hashes = _measure_hashes(arguments.rounds)
    busy = {load: _measure_loss(load, arguments.transport) for load in _LOADS}
    _print(fetches, parts, hashes, busy)


# The other process


class _Lender:
    """Lends what is asked for, from the first slot on."""

    def __init__(self) -> None:
        self.address = ""

    def lend(self, request: LeaseRequest) -> Future[Loan | None]:
        slots = tuple(range(len(request.hashes) // HASH_BYTES))
        end_s = time.monotonic() + 10 * _TIMEOUT_S
        future: Future[Loan | None] = Future()
        future.set_result(Loan(1, slots, end_s, (RankSource(self.address, 0, NUM_HEADS),)))
        return future

    def release(self, lease_id: int) -> None:
        """Nothing is held."""


def _spin_python() -> None:
    total = 0
    for i in range(2000):
        total += i


_MATRIX = np.ones((192, 192), np.float32)


def _spin_numpy() -> None:
    np.dot(_MATRIX, _MATRIX)


_LOADS = {"Python": _spin_python, "numpy": _spin_numpy}


def _serve(format_name: str, address: str, transport: str, busy: str | None) -> None:
    """Serve until the input ends. A line of input starts a busy phase, and its end is answered."""
    layout = LAYOUTS[format_name]
    lender = _Lender()
    with BlockServer(
        RankName(_EXPORTER, 1, 0),
        _host_slots(layout),
        _KEYS,
        address=address,
        lender=lender,
        transport=_transport(transport, layout),
    ) as server:
        lender.address = server.address
        print(server.address, flush=True)
        for _ in sys.stdin:
            assert busy is not None
            print(_rounds_per_s(_LOADS[busy]), flush=True)


def _rounds_per_s(load: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    num_rounds = 0
    while (elapsed_s := time.perf_counter() - started_s) < _BUSY_S:
        load()
        num_rounds += 1
    return num_rounds / elapsed_s


def _host_slots(layout: BlockLayout) -> HostSlots:
    shape = (NUM_BLOCKS, NUM_HEADS * layout.piece_bytes)
    memory = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return HostSlots(memory, layout, range(NUM_HEADS))


def _transport(name: str, layout: BlockLayout) -> Transport:
    if name == "socket":
        return SocketTransport()
    return MooncakeTransport("127.0.0.1", layout.piece_bytes, protocol="tcp")


# This process


@contextlib.contextmanager
def _exporter(
    format_name: str, where: str, transport: str, busy: str | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{Path(directory).resolve()}/0" if where == UNIX else "127.0.0.1:0"
        command = [sys.executable, "-m", "benchmarks.transfer", "--transport", transport]
        command += ["--serve", format_name, address] + (["--busy", busy] if busy else [])
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
            process.communicate()


def _ask(address: str, num_blocks: int) -> Lease:
    hashes = bytes(num_blocks * HASH_BYTES)
    request = LeaseRequest(_IMPORTER, "benchmark", hashes)
    return borrow(address, _EXPORTER, 1, request, _KEYS, timeout_s=_TIMEOUT_S)


class _Importer:
    def __init__(self, layout: BlockLayout, transport: Transport) -> None:
        self._slots = _host_slots(layout)
        self._transport = transport

    def fetch(self, lease: Lease) -> float:
        """Seconds."""
        return fetch_blocks(
            lease,
            self._slots,
            range(lease.grant.num_blocks),
            importer=_IMPORTER,
            rank=0,
            keys=_KEYS,
            timeout_s=_TIMEOUT_S,
            max_bytes=1 << 30,
            transport=self._transport,
        ).seconds


def _measure_fetches(format_name: str, where: str, transport: str, num_rounds: int) -> FetchTimes:
    layout = LAYOUTS[format_name]
    importer = _Importer(layout, _transport(transport, layout))
    with _exporter(format_name, where, transport) as (_, address):
        lease, short_lease = _ask(address, NUM_BLOCKS), _ask(address, 1)
        importer.fetch(lease)  # warms up
        times = [importer.fetch(lease) for _ in range(num_rounds)]
        one_block = [importer.fetch(short_lease) for _ in range(num_rounds)]
        asks = [_timed(lambda: _ask(address, NUM_BLOCKS)) for _ in range(num_rounds)]
    return FetchTimes(
        fetch_s=statistics.median(times),
        fastest_s=min(times),
        one_block_s=statistics.median(one_block),
        ask_s=statistics.median(asks),
        num_bytes=NUM_BLOCKS * NUM_HEADS * layout.piece_bytes,
    )


def _measure_parts(layout: BlockLayout, num_rounds: int) -> dict[str, float]:
    """Seconds for the whole prefix, by operation, in one thread and run by run."""
    held = _host_slots(layout)
    per_run = blocks_per_run(layout.piece_bytes)
    runs = [
        (np.arange(first, min(first + per_run, NUM_BLOCKS)), head)
        for head in range(NUM_HEADS)
        for first in range(0, NUM_BLOCKS, per_run)
    ]
    contents = [held.read(slots, head) for slots, head in runs]
    flat = [np.concatenate([np.frombuffer(part, np.uint8) for part in run]) for run in contents]

    def copy_in() -> None:
        for (slots, head), run in zip(runs, flat, strict=True):
            held.write(slots, head, run)

    operations: dict[str, Callable[[], object]] = {
        "copying out": lambda: [held.read(slots, head) for slots, head in runs],
        "digest": lambda: [digest(run) for run in contents],
        "copying in": copy_in,
    }
    return {
        name: statistics.median(_timed(operation) for _ in range(num_rounds))
        for name, operation in operations.items()
    }


def _measure_hashes(num_rounds: int) -> dict[str, float]:
    """GB/s over 1 MiB."""
    data = bytes(1 << 20)
    return {
        name: len(data) / statistics.median(_timed(partial(hash_, data)) for _ in range(num_rounds))
        for name, hash_ in HASHES.items()
    }


def _measure_loss(load: str, transport: str, num_rounds: int = 3) -> dict[str, float]:
    """Seconds that a main thread loses to a fetch, and how long that fetch takes meanwhile.

    `own_s` is what the exporter's main thread loses, `other_s` what that of a process loses which
    has no part in it, but the same cores.
    """
    layout = LAYOUTS["fp8"]
    importer = _Importer(layout, _transport(transport, layout))
    own: list[float] = []
    other: list[float] = []
    times: list[float] = []
    with (
        _exporter("fp8", UNIX, transport, busy=load) as (exporter, address),
        _exporter("fp8", UNIX, transport, busy=load) as (uninvolved, _),
    ):
        lease = _ask(address, NUM_BLOCKS)
        for _ in range(num_rounds):
            for process, losses in ((exporter, own), (uninvolved, other)):
                undisturbed, _ = _busy_phase(process, lambda: None)
                disturbed, fetches = _busy_phase(process, lambda: importer.fetch(lease))
                losses.append(_BUSY_S * (1 - disturbed / undisturbed) / len(fetches))
                times += fetches if process is exporter else []
    return {
        "own_s": statistics.median(own),
        "other_s": statistics.median(other),
        "fetch_s": statistics.median(times),
    }


def _busy_phase(
    process: subprocess.Popen[str], work: Callable[[], object]
) -> tuple[float, list[float]]:
    """The exporter's rounds a second while `work` is done now and then; how long that took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    times = []
    for _ in range(_NUM_BUSY_FETCHES):
        time.sleep(_BUSY_S / (_NUM_BUSY_FETCHES + 1))
        times.append(_timed(work))
    return float(process.stdout.readline()), times


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _print(
    fetches: dict[str, FetchTimes],
    parts: dict[str, dict[str, float]],
    hashes: dict[str, float],
    busy: dict[str, dict[str, float]],
) -> None:
    print_table(
        [f"{NUM_TOKENS} tokens", "MB", "ms", "fastest", "GB/s", "one block, ms", "asking, ms"],
        [
            [
                name,
                f"{times.num_bytes / 1e6:.1f}",
                f"{times.fetch_s * 1e3:.1f}",
                f"{times.fastest_s * 1e3:.1f}",
                f"{times.num_bytes / times.fetch_s / 1e9:.2f}",
                f"{times.one_block_s * 1e3:.2f}",
                f"{times.ask_s * 1e3:.2f}",
            ]
            for name, times in fetches.items()
        ],
    )
    print_table(
        ["alone, ms", *parts],
        [
            [operation, *(f"{times[operation] * 1e3:.1f}" for times in parts.values())]
            for operation in next(iter(parts.values()))
        ],
    )
    print_table(["hash", "GB/s"], [[name, f"{rate / 1e9:.2f}"] for name, rate in hashes.items()])
    print_table(
        ["a main thread runs", "loses, ms a fetch", "an uninvolved one", "the fetch, ms"],
        [
            [load, *(f"{figures[key] * 1e3:.1f}" for key in ("own_s", "other_s", "fetch_s"))]
            for load, figures in busy.items()
        ],
    )
    figures: dict[str, Any] = {
        "fetches": {name: asdict(times) for name, times in fetches.items()},
        "parts_s": parts,
        "hashes_bytes_per_s": hashes,
        "busy": busy,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
