"""The engine on a model that one or more ranks hold together, as their processes see it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cache.host_pages import HostPages
from gpu_worker.engine.engine import CPU_STEP_TOKENS, GPU_STEP_TOKENS, Engine, EngineModel
from gpu_worker.engine.step_builder import first_step
from gpu_worker.kernels import library as kernels
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.memory import default_host_cache_bytes
from gpu_worker.model_runner import ModelRunner
from gpu_worker.rank_options import RankOptions
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup
from wire.errors import ConfigError

_NO_LOGITS = torch.empty((0, 0))


class RankRunner:
    """One rank's part of each step: blocks go to host memory and come back, then the model runs."""

    def __init__(self, model: ModelRunner, host: HostPages) -> None:
        self.model = model
        self.host = host

    def execute(self, plan: StepPlan) -> Tensor | None:
        """The logits of the plan's `logits_rows` on rank 0, None on the others."""
        if len(plan.copies_out):
            self.host.copy_out(plan.copies_out)
        if len(plan.copies_in):
            self.host.copy_in(plan.copies_in)
        return self.model.execute(plan) if plan.num_tokens else None


class LeadRunner:
    """Rank 0's runner: the other ranks get each plan first, then all compute it together."""

    def __init__(self, runner: RankRunner, group: TensorParallelGroup) -> None:
        self._runner = runner
        self._group = group

    def execute(self, plan: StepPlan) -> Tensor:
        """The logits of the plan's `logits_rows`."""
        self._group.send_plan(plan)
        logits = self._runner.execute(plan)
        if not plan.num_tokens:
            return _NO_LOGITS
        assert logits is not None, "rank 0 gathers the logits"
        return logits


class ShardedEngine(Engine):
    """Rank 0's engine. Leaving it as a context releases the other ranks."""

    def __init__(
        self, size: int, rendezvous: Path, options: RankOptions, layers: LayerCounter
    ) -> None:
        self._group, rank_runner = _load(0, size, rendezvous, options, layers)
        model, host = rank_runner.model, rank_runner.host
        config = model.config
        runner = LeadRunner(rank_runner, self._group)
        # What is set up by the first step (connections, libraries' handles, kernels) would else
        # delay, or on a bad day fail, a request; loading may take the time.
        runner.execute(first_step())
        super().__init__(
            runner,
            EngineModel(
                vocab_size=config.vocab_size,
                max_model_len=config.max_model_len,
                eos_token_ids=config.eos_token_ids,
                num_blocks=model.num_blocks,
                cache_format=_cache_format(model),
                num_host_blocks=host.num_slots,
                step_tokens=CPU_STEP_TOKENS if model.device.type == "cpu" else GPU_STEP_TOKENS,
            ),
            options,
        )

    def __enter__(self) -> ShardedEngine:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error in a step the ranks may not be where a plan would be understood: they
        # find out by the connection that closes when this process ends.
        if error is None or isinstance(error, (EOFError, OSError)):
            self._group.send_plan(None)
            self._group.close()


def follow(rank: int, size: int, rendezvous: Path, options: RankOptions) -> None:
    """Be a rank above 0: load this rank's part, then compute what rank 0 plans until it ends.

    Raises ModelError if the model cannot be loaded, and CollectiveFailed (or what torch raises)
    when another rank is gone.
    """
    group, runner = _load(rank, size, rendezvous, options, LayerCounter())
    while (plan := group.receive_plan()) is not None:
        runner.execute(plan)
    group.close()


def _load(
    rank: int, size: int, rendezvous: Path, options: RankOptions, layers: LayerCounter
) -> tuple[TensorParallelGroup, RankRunner]:
    num_threads = options.num_threads or max(1, _num_cores() // size)
    kernels.set_num_threads(num_threads)
    # What is left to torch beside our kernels is small, and its idle threads would spin on the
    # cores that the kernels' threads need.
    torch.set_num_threads(1 if kernels.isa() is not None else num_threads)
    device = _device(rank)
    group = TensorParallelGroup.connect(
        rank, size, rendezvous, device, options.collective_timeout_s
    )
    model = ModelRunner(
        Path(options.model_path),
        group=group,
        dtype=options.dtype,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        device=device,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        kv_cache_bytes=options.kv_cache_bytes,
        max_model_len=options.max_model_len,
        layers=layers,
    )
    if model.precision.isa is None:  # the kernels cannot take this model
        torch.set_num_threads(num_threads)
    host = HostPages(model.pages, _num_host_slots(options, model, group))
    group.meet()
    return group, RankRunner(model, host)


def _cache_format(model: ModelRunner) -> str:
    """The same at every tensor-parallel size."""
    precision = model.precision
    return f"{model.content_digest}/{precision.name}/{precision.pages.name}/{model.block_size}"


def _num_host_slots(options: RankOptions, model: ModelRunner, group: TensorParallelGroup) -> int:
    """As many as the rank with the least memory for them, or the most heads, has room for."""
    size_bytes = options.host_cache_bytes
    if size_bytes is None:
        size_bytes = default_host_cache_bytes(model.device, group.size)
    return group.minimum(size_bytes // model.pages.shape.bytes_per_block)


def _num_cores() -> int:
    """The cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device(rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if rank >= num_gpus:
        raise ConfigError(
            f"rank {rank} finds no GPU of its own, this machine has {num_gpus}; "
            f"use a tensor-parallel size of at most {num_gpus}"
        )
    return torch.device("cuda", rank)
