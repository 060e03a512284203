"""What a worker group serves with besides its ranks: connections, and its model's card."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog
from redis.asyncio import Redis

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.models.card import load_model_card
from gpu_worker.orchestrator import Orchestrator
from gpu_worker.rank_group import RankGroup
from gpu_worker.rank_protocol import RankReady
from gpu_worker.restarts import RestartPolicy
from gpu_worker.text import TextDecoder
from service.lifecycle import unless_stopped
from service.settings import WorkerSettings
from wire.client import connect, ping, redis_errors
from wire.ids import GroupId
from wire.messages import ModelCard

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_serving(settings: WorkerSettings, *, name: str) -> AsyncIterator[Serving]:
    """Connect to the server, for a group whose model is called `name`.

    Raises ServerUnreachable when the server does not answer, or refuses us later.
    """
    url = settings.redis_url.get_secret_value()
    client, blocking_client = connect(url), connect(url, blocking=True)
    try:
        await ping(client, url)
        with redis_errors(url):
            yield Serving(settings, client, blocking_client, name=name)
    finally:
        await client.aclose()
        await blocking_client.aclose()


class Serving:
    """A group as the fleet knows it: one name and one model, whatever becomes of its ranks."""

    def __init__(
        self, settings: WorkerSettings, client: Redis, blocking_client: Redis, *, name: str
    ) -> None:
        self._settings = settings
        self._client = client
        self._blocking_client = blocking_client
        self._name = name
        self._group_id = GroupId(settings.group_id or os.urandom(4).hex())
        self._model: tuple[ModelCard, TextDecoder] | None = None

    async def serve(self, ranks: RankGroup, *, policy: RestartPolicy, stop: asyncio.Event) -> None:
        """Serve with these ranks until they are lost, or `stop` is set.

        Raises ModelError, RankLost.
        """
        ready = await unless_stopped(self._load(ranks), stop)
        if ready is None:
            return
        assert self._model is not None
        card, decoder = self._model
        policy.ready(time.monotonic())
        log.info(
            "ranks restarted" if policy.num_restarts else "ranks ready",
            model=card.name,
            load_s=round(ready.load_s, 3),
            num_blocks=ready.num_blocks,
            max_model_len=ready.max_model_len,
            num_restarts=policy.num_restarts,
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
            cache_format=ready.cache_format,
            on_answer=policy.answered,
        )
        await orchestrator.run(stop)

    async def _load(self, ranks: RankGroup) -> RankReady:
        if self._model is None:
            # While the ranks load; of what is wrong with the model this hears first.
            self._model = await asyncio.to_thread(self._load_model)
        return await ranks.wait_ready(self._settings.load_timeout_s)

    def _load_model(self) -> tuple[ModelCard, TextDecoder]:
        card = self._load_card()
        return card, TextDecoder(card.tokenizer_json)

    def _load_card(self) -> ModelCard:
        settings = self._settings
        if settings.model_path is None:
            return stub_model_card(
                name=self._name,
                block_size=settings.block_size,
                max_model_len=settings.max_model_len,
            )
        return load_model_card(
            settings.model_path,
            name=self._name,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
        )
