"""Ranks that are cheap to start: processes forked from one that has loaded torch already.

    python -m support.collective_ranks DIRECTORY

Each line {"scenario": "sums", "size": 2, "carrier": "gloo"} runs a function of this module in that
many processes, and is answered by a line with a list of what it returned on each rank, or of
{"failed": message, "after_s": seconds}; null for a rank that died.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from gpu_worker.collectives.interface import CollectiveFailed
from gpu_worker.engine.step_builder import first_step
from gpu_worker.tensor_parallel import TensorParallelGroup

COUNTS = (1, 17, 5_000, 65_536, 200_003)
"""Lengths of one and of several slots of the shared memory, and next to their borders."""


def sums(group: TensorParallelGroup, directory: Path) -> Any:
    """Digests of the sums, and whether they are those of the ranks' order to the last bit."""
    digests, exact = [], True
    for count in COUNTS:
        values = _values(count, group.rank)
        assert group.all_reduce(values) is values
        expected = _values(count, 0)
        for rank in range(1, group.size):
            expected += _values(count, rank)
        assert (values - expected).abs().max() < 1e-5
        exact = exact and torch.equal(values, expected)
        digests.append(hashlib.blake2b(values.numpy().tobytes()).hexdigest())
    return {"digests": digests, "exact": exact}


def narrow_sums(group: TensorParallelGroup, directory: Path) -> Any:
    """A sum of bfloat16 that is not contiguous."""
    values = torch.full((6, 4), 1.5 + group.rank, dtype=torch.bfloat16).T
    group.all_reduce(values)
    return sorted(set(values.flatten().tolist()))


def gathers(group: TensorParallelGroup, directory: Path) -> Any:
    """Column sums of gathered matrices that grow, of which rank 0 changes each."""
    widths = tuple(3 + rank for rank in range(group.size))
    seen = []
    for num_rows in (2, 1, 300, 2_000):
        columns = torch.full((num_rows, widths[group.rank]), float(group.rank + 1))
        matrix = group.gather_columns(columns, widths)
        assert (matrix is None) == (group.rank != 0)
        if matrix is not None:
            assert matrix.dtype == torch.float32
            seen.append((matrix.sum(0) / num_rows).tolist())
            matrix.fill_(-1.0)
    return seen


def minima(group: TensorParallelGroup, directory: Path) -> Any:
    """The least of large numbers, with each rank having it once."""
    size = group.size
    return [group.minimum(2**40 + (group.rank + turn) % size) for turn in range(size + 1)]


def messages(group: TensorParallelGroup, directory: Path) -> Any:
    """Lengths and sums of messages that rank 0 sends without waiting."""
    assert group._collectives is not None
    seen = []
    for length in (1, 0, 4_095, 4_096, 300_000, 7):
        if group.rank == 0:
            group._collectives.send(torch.arange(length, dtype=torch.int32))
        else:
            message = group._collectives.receive()
            assert message.dtype == torch.int32
            seen.append([len(message), int(message.sum())])
    return seen


def plans(group: TensorParallelGroup, directory: Path) -> Any:
    """A plan arrives whole, and None says that it was the last."""
    if group.rank == 0:
        group.send_plan(first_step())
        group.send_plan(None)
        return None
    received = group.receive_plan()
    assert received is not None
    assert torch.equal(received.pack(), first_step().pack())
    return group.receive_plan() is None


def late(group: TensorParallelGroup, directory: Path) -> Any:
    """All but rank 0 wait for something else than rank 0."""
    if group.rank == 0:
        group.all_reduce(torch.ones(3))
    else:
        group.receive_plan()


def dies(group: TensorParallelGroup, directory: Path) -> Any:
    """Rank 1 dies while the others need it."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(torch.ones(100_000))


def lead_dies(group: TensorParallelGroup, directory: Path) -> Any:
    """Rank 0 dies while the others wait for its next plan."""
    if group.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    group.receive_plan()


def idles(group: TensorParallelGroup, directory: Path) -> Any:
    """Seconds of CPU time in which a second of waiting for a plan is spent."""
    group.meet()
    started_s = time.process_time()
    if group.rank == 0:
        time.sleep(1)  # what is measured is a wait of this length
        group.send_plan(None)
    else:
        group.receive_plan()
    return time.process_time() - started_s


def leftovers(group: TensorParallelGroup, directory: Path) -> Any:
    """Names of files once all ranks have met."""
    group.meet()
    return [path.name for path in directory.iterdir()]


SCENARIOS: dict[str, Callable[[TensorParallelGroup, Path], Any]] = {
    function.__name__: function
    for function in (
        sums,
        narrow_sums,
        gathers,
        minima,
        messages,
        plans,
        late,
        dies,
        lead_dies,
        idles,
        leftovers,
    )
}


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryDirectory(dir=sys.argv[1]) as directory:
            ranks = [_fork(order, rank, Path(directory)) for rank in range(order["size"])]
            answers = [os.fdopen(fd).read() for _, fd in ranks]
            for pid, _ in ranks:
                os.waitpid(pid, 0)
        print(json.dumps([json.loads(answer) if answer else None for answer in answers]))
        sys.stdout.flush()


def _fork(order: dict[str, Any], rank: int, directory: Path) -> tuple[int, int]:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_fd)
        return pid, read_fd
    os.close(read_fd)
    try:
        os.write(write_fd, json.dumps(_run(order, rank, directory)).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _run(order: dict[str, Any], rank: int, directory: Path) -> Any:
    if order["carrier"] == "gloo":
        os.environ["FOREBAY_CPU_ISA"] = "torch"
    group = TensorParallelGroup.connect(
        rank, order["size"], directory / "meeting", torch.device("cpu"), order["timeout_s"]
    )
    started_s = time.monotonic()
    try:
        result = SCENARIOS[order["scenario"]](group, directory)
        group.close()
    except CollectiveFailed as error:
        return {"failed": str(error), "after_s": time.monotonic() - started_s}
    return result


def _values(count: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(count + rank)
    return torch.randn(count, generator=generator)


if __name__ == "__main__":
    main()
