"""Bringing a worker group up, and down again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.models.card import default_model_name, load_model_card
from gpu_worker.orchestrator import Orchestrator
from gpu_worker.rank_group import open_ranks
from gpu_worker.rank_options import STUB_MODEL_PATH, RankOptions
from service.lifecycle import shutdown_signals, unless_stopped
from service.settings import WorkerSettings
from wire.client import connect, ping, redis_errors
from wire.messages import ModelCard

log = structlog.get_logger(__name__)


async def run(settings: WorkerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises ModelError for a model that cannot be loaded, ServerUnreachable when the server does not
    answer at the start or refuses us later, RankLost when a rank is lost on the way.
    """
    async with shutdown_signals() as stop, open_orchestrator(settings, stop) as orchestrator:
        if orchestrator is not None:
            with redis_errors(settings.redis_url.get_secret_value()):
                await orchestrator.run(stop)


@asynccontextmanager
async def open_orchestrator(
    settings: WorkerSettings, stop: asyncio.Event
) -> AsyncIterator[Orchestrator | None]:
    """A group whose ranks have loaded the model; None if `stop` came first.

    Nothing is left of it at the end.
    """
    url = settings.redis_url.get_secret_value()
    client, blocking_client = connect(url), connect(url, blocking=True)
    try:
        await ping(client, url)
        async with open_ranks(_rank_options(settings), settings.tensor_parallel_size) as ranks:
            # While the ranks load; of what is wrong with the model this hears first.
            card = await asyncio.to_thread(_load_card, settings)
            ready = await unless_stopped(ranks.wait_ready(settings.load_timeout_s), stop)
            if ready is None:
                yield None
                return
            log.info(
                "ranks ready",
                model=card.name,
                load_s=round(ready.load_s, 3),
                num_blocks=ready.num_blocks,
                max_model_len=ready.max_model_len,
            )
            # A small KV-cache may hold less than the model's context.
            card = replace(card, max_model_len=min(card.max_model_len, ready.max_model_len))
            yield Orchestrator(
                settings, card, ranks, client=client, blocking_client=blocking_client
            )
    finally:
        await client.aclose()
        await blocking_client.aclose()


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
        collective_timeout_s=settings.step_timeout_s,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
