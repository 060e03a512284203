"""Bringing a worker group up, and down again."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import structlog
from redis.asyncio import Redis

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.models.card import default_model_name, load_model_card
from gpu_worker.orchestrator import Orchestrator
from gpu_worker.output import TextDecoder
from gpu_worker.rank_group import RankGroup, open_ranks
from gpu_worker.rank_options import STUB_MODEL_PATH, RankOptions
from gpu_worker.rank_protocol import RankReady
from gpu_worker.restarts import RestartPolicy
from gpu_worker.supervisor import supervise
from service.lifecycle import shutdown_signals, unless_stopped
from service.settings import WorkerSettings
from wire.client import connect, ping, redis_errors
from wire.ids import GroupId
from wire.messages import ModelCard

log = structlog.get_logger(__name__)

MAX_PROGRESS_INTERVAL_S = 1.0
REPORTS_PER_TIMEOUT = 4


async def run(settings: WorkerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Nothing is left of the group at the end.

    Raises ModelError for a model that cannot be loaded, ServerUnreachable when the server does not
    answer at the start or refuses us later, RankLost when the ranks cannot be (re)started.
    """
    url = settings.redis_url.get_secret_value()
    client, blocking_client = connect(url), connect(url, blocking=True)
    try:
        async with shutdown_signals() as stop:
            await ping(client, url)
            group = _Group(settings, client, blocking_client, stop)
            with redis_errors(url):
                await supervise(group.start_ranks, group.serve, policy=group.policy, stop=stop)
    finally:
        await client.aclose()
        await blocking_client.aclose()


class _Group:
    """What a group keeps while its ranks come and go: its name, its model's card."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: Redis,
        blocking_client: Redis,
        stop: asyncio.Event,
    ) -> None:
        self.policy = RestartPolicy()
        self._settings = settings
        self._client = client
        self._blocking_client = blocking_client
        self._stop = stop
        self._group_id = GroupId(settings.group_id or os.urandom(4).hex())
        self._model: tuple[ModelCard, TextDecoder] | None = None

    def start_ranks(self) -> AbstractAsyncContextManager[RankGroup]:
        return open_ranks(_rank_options(self._settings), self._settings.tensor_parallel_size)

    async def serve(self, ranks: RankGroup) -> None:
        """Serve with these ranks until they are lost, or the group is told to stop."""
        ready = await unless_stopped(self._load(ranks), self._stop)
        if ready is None:
            return
        assert self._model is not None
        card, decoder = self._model
        self.policy.ready(time.monotonic())
        log.info(
            "ranks restarted" if self.policy.num_restarts else "ranks ready",
            model=card.name,
            load_s=round(ready.load_s, 3),
            num_blocks=ready.num_blocks,
            max_model_len=ready.max_model_len,
            num_restarts=self.policy.num_restarts,
        )
        orchestrator = Orchestrator(
            self._settings,
            # A small KV-cache may hold less than the model's context.
            replace(card, max_model_len=min(card.max_model_len, ready.max_model_len)),
            decoder,
            ranks,
            group_id=self._group_id,
            client=self._client,
            blocking_client=self._blocking_client,
            on_answer=self.policy.answered,
        )
        await orchestrator.run(self._stop)

    async def _load(self, ranks: RankGroup) -> RankReady:
        if self._model is None:
            # While the ranks load; of what is wrong with the model this hears first.
            self._model = await asyncio.to_thread(_load_model, self._settings)
        return await ranks.wait_ready(self._settings.load_timeout_s)


def _load_model(settings: WorkerSettings) -> tuple[ModelCard, TextDecoder]:
    card = _load_card(settings)
    return card, TextDecoder(card.tokenizer_json)


def _model_name(settings: WorkerSettings) -> str:
    if settings.served_model_name is not None:
        return settings.served_model_name
    return "stub" if settings.model_path is None else default_model_name(settings.model_path)


def _load_card(settings: WorkerSettings) -> ModelCard:
    name = _model_name(settings)
    if settings.model_path is None:
        return stub_model_card(
            name=name,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
        )
    return load_model_card(
        settings.model_path,
        name=name,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len,
    )


def _rank_options(settings: WorkerSettings) -> RankOptions:
    path = settings.model_path
    return RankOptions(
        model_path=STUB_MODEL_PATH if path is None else str(path),
        model_name=_model_name(settings),
        dtype=settings.dtype,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
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
    )
