"""The models that the fleet serves, by the cards that their groups published."""

from __future__ import annotations

import asyncio

import structlog
from redis.asyncio import Redis

from cache.prefix_hash import PrefixHasher
from scheduler.tokenization import PromptTokenizer
from wire.codec import decode
from wire.errors import ForebayError
from wire.keys import Keys
from wire.messages import ModelCard

log = structlog.get_logger(__name__)


class ModelCatalog:
    """Tokenizers by model name, loaded when a group is first seen to serve the model."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._tokenizers: dict[str, PromptTokenizer] = {}
        self._cards: dict[str, bytes] = {}

    def get(self, model: str) -> PromptTokenizer | None:
        """The model's tokenizer, None while no group has been seen to serve it."""
        return self._tokenizers.get(model)

    async def refresh(self, model: str) -> None:
        """Load the model's card again if it changed: a group that serves it has (re)started."""
        data = await self._client.get(self._keys.model(model))
        if not isinstance(data, bytes) or data == self._cards.get(model):
            return
        try:
            card = decode(ModelCard, data)
            # Parsing a large vocabulary takes tenths of a second: not in the event loop.
            self._tokenizers[model] = await asyncio.to_thread(PromptTokenizer, card)
        except ForebayError as error:
            log.error("model card refused", model=model, error=str(error))
            return
        self._cards[model] = data
        log.info("model known", model=model, max_model_len=card.max_model_len)

    def hasher(self, model: str, cache_format: str, salt: bytes) -> PrefixHasher:
        """Hashes prompts as the model's groups with that cache format do, for a tenant's salt."""
        card = self._tokenizers[model].card
        return PrefixHasher(
            model=model, cache_format=cache_format, salt=salt, block_size=card.block_size
        )
