"""The engine on a model that one or more ranks hold together, as their processes see it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gpu_worker.engine.engine import Engine, EngineModel
from gpu_worker.engine.step_builder import first_step
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.model_runner import ModelRunner
from gpu_worker.rank_options import RankOptions
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup
from wire.errors import ConfigError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LeadRunner:
    """Rank 0's runner: the other ranks get each plan first, then all compute it together."""

    def __init__(self, model: ModelRunner, group: TensorParallelGroup) -> None:
        self._model = model
        self._group = group

    def execute(self, plan: StepPlan) -> Tensor:
        """The logits of the plan's `logits_rows`."""
        self._group.send_plan(plan)
        logits = self._model.execute(plan)
        assert logits is not None, "rank 0 gathers the logits"
        return logits


class ShardedEngine(Engine):
    """Rank 0's engine. Leaving it as a context releases the other ranks."""

    def __init__(
        self, size: int, rendezvous: Path, options: RankOptions, layers: LayerCounter
    ) -> None:
        self._group, model = _load(0, size, rendezvous, options, layers)
        config = model.config
        runner = LeadRunner(model, self._group)
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
                cache_format=f"{_dtype(options.dtype, model.device)}/{options.block_size}",
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

    Raises ModelError if the model cannot be loaded, and what torch raises when rank 0 is gone.
    """
    group, model = _load(rank, size, rendezvous, options, LayerCounter())
    while (plan := group.receive_plan()) is not None:
        model.execute(plan)
    group.close()


def _load(
    rank: int, size: int, rendezvous: Path, options: RankOptions, layers: LayerCounter
) -> tuple[TensorParallelGroup, ModelRunner]:
    torch.set_num_threads(options.num_threads or max(1, _num_cores() // size))
    device = _device(rank)
    group = TensorParallelGroup.connect(
        rank, size, rendezvous, device, options.collective_timeout_s
    )
    model = ModelRunner(
        Path(options.model_path),
        group=group,
        dtype=_dtype(options.dtype, device),
        device=device,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        kv_cache_bytes=options.kv_cache_bytes,
        max_model_len=options.max_model_len,
        layers=layers,
    )
    group.meet()
    return group, model


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


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on the CPU, where 16-bit GEMMs are no faster, and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name}; it must be auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
