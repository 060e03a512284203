"""How long one rank computes if its exchanges cost nothing: the compute side of the scaling model.

A rank's shard runs alone in one process and thread; all-reduces leave the values as they are, so
the numbers are wrong and the work is right. Times are the thread's own CPU seconds: what else runs
on the machine does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.scaling_model import Load
from gpu_worker.model_runner import ModelRunner
from gpu_worker.rank_options import RankOptions
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup


class FreeExchanges:
    """`Collectives` that cost nothing; the columns of the other ranks stay as they were."""

    def __init__(self) -> None:
        self._matrix = torch.zeros(0)

    def all_reduce(self, values: Tensor) -> None:
        """Leave them."""

    def gather_columns(self, columns: Tensor, widths: tuple[int, ...]) -> Tensor:
        """This rank's columns as the first ones."""
        num_rows, width = columns.shape
        if self._matrix.shape != (num_rows, sum(widths)):
            self._matrix = torch.zeros(num_rows, sum(widths))
        self._matrix[:, :width] = columns
        return self._matrix

    def minimum(self, value: int) -> int:
        """The only value."""
        return value

    def send(self, message: Tensor) -> None:
        """To nobody."""

    def receive(self) -> Tensor:
        """Nobody sends."""
        raise AssertionError("a shard that runs alone leads")

    def close(self) -> None:
        """There is nothing to leave."""


class LoneShard:
    """One rank's part of the model, in this process."""

    def __init__(self, options: RankOptions, rank: int, size: int) -> None:
        group = TensorParallelGroup(rank, size, FreeExchanges())
        self._runner = ModelRunner(
            Path(options.model_path),
            group=group if size > 1 else TensorParallelGroup.single(),
            dtype=options.dtype,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            block_size=options.block_size,
            kv_cache_bytes=options.kv_cache_bytes,
        )
        self.config = self._runner.config

    def seconds(self, load: Load) -> float:
        """One step."""
        plan = _plan(load, self._runner.block_size)
        started_s = time.thread_time()
        self._runner.execute(plan)
        return time.thread_time() - started_s


def median_seconds(shards: Sequence[LoneShard], load: Load, *, num_rounds: int) -> list[float]:
    """Each shard's step, the shards in turns, after a warm-up."""
    for shard in shards:
        shard.seconds(load)
    rounds = [[shard.seconds(load) for shard in shards] for _ in range(num_rounds)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _plan(load: Load, block_size: int) -> StepPlan:
    num_blocks = -(-load.context_len // block_size)
    tables = torch.arange(load.num_seqs * num_blocks, dtype=torch.int32)
    tables = tables.view(load.num_seqs, num_blocks)
    positions = torch.arange(load.context_len - load.num_new, load.context_len, dtype=torch.int32)
    slots = tables[:, positions // block_size] * block_size + positions % block_size
    starts = torch.arange(0, load.num_tokens + 1, load.num_new, dtype=torch.int32)
    return StepPlan(
        token_ids=torch.arange(load.num_tokens, dtype=torch.int32) % 1000,
        positions=positions.repeat(load.num_seqs),
        slot_mapping=slots.flatten(),
        query_starts=starts,
        context_lens=torch.full((load.num_seqs,), load.context_len, dtype=torch.int32),
        block_tables=tables,
        logits_rows=starts[1:] - 1,
    )
