"""Bringing a worker group up, and down again.

    ranks: start Python, import torch, load the model ─────────────────────┐
    group: import what serves, connect, read the model's card, tokenizer ──┴─> join the fleet

Ranks take longest to start, so they are first: what this module imports, they wait for.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from gpu_worker.models.fetching import fetch_ahead
from gpu_worker.models.files import default_model_name
from gpu_worker.rank_group import RankGroup, open_ranks
from gpu_worker.rank_options import STUB_MODEL_PATH, RankOptions
from gpu_worker.restarts import RestartPolicy
from gpu_worker.supervisor import supervise
from service.lifecycle import shutdown_signals
from service.settings import WorkerSettings

if TYPE_CHECKING:
    from gpu_worker.serving import Serving

MAX_PROGRESS_INTERVAL_S = 1.0
REPORTS_PER_TIMEOUT = 4


async def run(settings: WorkerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Nothing is left of the group at the end.

    Raises ModelError for a model that cannot be loaded, ServerUnreachable when the server does not
    answer at the start or refuses us later, RankLost when the ranks cannot be (re)started.
    """
    async with shutdown_signals() as stop, AsyncExitStack() as stack:
        group = _Group(settings, stop, stack)
        await supervise(group.start_ranks, group.serve, policy=group.policy, stop=stop)


class _Group:
    """What a group keeps while its ranks come and go."""

    def __init__(
        self, settings: WorkerSettings, stop: asyncio.Event, stack: AsyncExitStack
    ) -> None:
        self.policy = RestartPolicy()
        self._settings = settings
        self._stop = stop
        self._stack = stack
        self._serving: Serving | None = None

    def start_ranks(self) -> AbstractAsyncContextManager[RankGroup]:
        if self._settings.model_path is not None:
            fetch_ahead(self._settings.model_path)
        return open_ranks(rank_options(self._settings), self._settings.tensor_parallel_size)

    async def serve(self, ranks: RankGroup) -> None:
        """Serve with these ranks until they are lost, or the group is told to stop."""
        if self._serving is None:
            from gpu_worker.serving import open_serving

            serving = open_serving(self._settings, name=_model_name(self._settings))
            self._serving = await self._stack.enter_async_context(serving)
        await self._serving.serve(ranks, policy=self.policy, stop=self._stop)


def _model_name(settings: WorkerSettings) -> str:
    if settings.served_model_name is not None:
        return settings.served_model_name
    return "stub" if settings.model_path is None else default_model_name(settings.model_path)


def rank_options(settings: WorkerSettings) -> RankOptions:
    """What the ranks are told of `settings`."""
    path = settings.model_path
    return RankOptions(
        model_path=STUB_MODEL_PATH if path is None else str(path),
        model_name=_model_name(settings),
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        cpu_isa=settings.cpu_isa,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        host_cache_bytes=settings.host_cache_bytes,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_threads=settings.threads,
        # The orchestrator ends ranks that hang; should it fail to, they end themselves later.
        collective_timeout_s=2 * settings.step_timeout_s,
        progress_interval_s=min(
            MAX_PROGRESS_INTERVAL_S, settings.step_timeout_s / REPORTS_PER_TIMEOUT
        ),
        log_level=settings.log_level,
        log_format=settings.log_format,
        stub_step_s=settings.stub_step_s,
    )
