"""From arrivals to requests that can be sent: find the model, tokenize, hash, or say why not."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from cache.prefix_hash import PrefixHasher
from scheduler.backlog import Backlog
from scheduler.catalog import ModelCatalog
from scheduler.fleet import Fleet
from scheduler.intake import Arrival, Intake
from scheduler.policy.pending import ReadyRequest
from scheduler.salts import TenantSalts
from scheduler.tokenization import PromptTokenizer
from wire.errors import ForebayError, InvalidRequest
from wire.ids import BlockHash, TokenIds
from wire.messages import Request

TOKENIZE_AT_ONCE = 64


class Preparer:
    """Moves the backlog from arrived to pending."""

    def __init__(
        self,
        backlog: Backlog,
        *,
        intake: Intake,
        catalog: ModelCatalog,
        fleet: Fleet,
        salts: TenantSalts,
    ) -> None:
        self._backlog = backlog
        self._intake = intake
        self._catalog = catalog
        self._fleet = fleet
        self._salts = salts
        self._cache_formats: dict[str, frozenset[str]] = {}

    async def prepare(self) -> None:
        """Wait until there is something to prepare; prepare all of it, some at a time."""
        await self._backlog.to_prepare.wait()
        self._backlog.to_prepare.clear()
        waiting: list[Arrival] = []
        while self._backlog.arrived and not self._backlog.closing:
            count = min(TOKENIZE_AT_ONCE, len(self._backlog.arrived))
            arrivals = [self._backlog.arrived.popleft() for _ in range(count)]
            try:
                waiting += await self._prepare_some(arrivals)
            except BaseException:
                # Those that were done already are sent twice; their fencing tokens sort it out.
                self._backlog.arrived.extendleft(reversed(waiting + arrivals))
                raise
        # They are looked at again when a group joins.
        self._backlog.arrived.extendleft(reversed(waiting))

    async def _prepare_some(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Tokenize, or end. Returns those whose model nobody serves at the moment."""
        by_model: dict[str, list[tuple[Arrival, Request]]] = defaultdict(list)
        waiting: list[Arrival] = []
        for arrival in arrivals:
            if isinstance(arrival.request, ForebayError):
                await self._intake.end(arrival.queued, "failed", arrival.request)
                continue
            model = self._model_of(arrival.request)
            if isinstance(model, ForebayError):
                await self._intake.end(arrival.queued, "failed", model)
            elif model is None:
                waiting.append(arrival)
            else:
                by_model[model].append((arrival, arrival.request))
        for model, some in by_model.items():
            await self._tokenize(model, some)
        return waiting

    def _model_of(self, request: Request) -> str | ForebayError | None:
        """The model to use, an error, or None while it is not known which groups will be there."""
        served = sorted(self._fleet.view.models)
        if request.model is not None:
            if self._catalog.get(request.model) is not None:
                return request.model
            # A group that has just joined is in view before its model's card is read.
            if served and request.model not in served:
                return InvalidRequest(
                    f"model {request.model[:80]!r} is not served here; "
                    f"take one of: {', '.join(served)}",
                    field="model",
                )
            return None
        if len(served) > 1:
            return InvalidRequest(
                f"no model was named and several are served; take one of: {', '.join(served)}",
                field="model",
            )
        return served[0] if served and self._catalog.get(served[0]) is not None else None

    def _on_our_clock(self, server_ms: int) -> float:
        return time.monotonic() - max(0, self._fleet.server_ms() - server_ms) / 1000

    async def _tokenize(self, model: str, arrivals: list[tuple[Arrival, Request]]) -> None:
        tokenizer = self._catalog.get(model)
        assert tokenizer is not None
        outcomes = await asyncio.to_thread(
            _tokenize_and_hash,
            tokenizer,
            [(request, self._hashers(model, request.tenant)) for _, request in arrivals],
        )
        for (arrival, request), outcome in zip(arrivals, outcomes, strict=True):
            if isinstance(outcome, ForebayError):
                await self._intake.end(arrival.queued, "failed", outcome)
                continue
            prompt_token_ids, chains = outcome
            self._backlog.ready(
                ReadyRequest(
                    arrival.queued,
                    request,
                    model,
                    prompt_token_ids,
                    chains,
                    arrival.journaled,
                    submitted_s=self._on_our_clock(arrival.submitted_ms),
                    ready_s=time.monotonic(),
                    deadline_ms=arrival.deadline_ms,
                    num_crashes=arrival.num_crashes,
                    num_neighbours=arrival.num_neighbours,
                )
            )
        self._backlog.to_dispatch.set()

    def _hashers(self, model: str, tenant: str) -> dict[str, PrefixHasher]:
        """One for each cache format of the model's groups; while there are none, as of the last."""
        if formats := self._fleet.view.cache_formats(model):
            self._cache_formats[model] = formats
        salt = self._salts.of(tenant)
        return {
            cache_format: self._catalog.hasher(model, cache_format, salt)
            for cache_format in self._cache_formats.get(model, ())
        }


def _tokenize_and_hash(
    tokenizer: PromptTokenizer, requests: Sequence[tuple[Request, Mapping[str, PrefixHasher]]]
) -> list[tuple[TokenIds, dict[str, tuple[BlockHash, ...]]] | ForebayError]:
    """Runs in a thread: token ids and block hashes of each prompt, or what is wrong with it."""
    outcomes: list[tuple[TokenIds, dict[str, tuple[BlockHash, ...]]] | ForebayError] = []
    tokenized = tokenizer.tokenize([request for request, _ in requests])
    for (_, hashers), ids in zip(requests, tokenized, strict=True):
        if isinstance(ids, ForebayError):
            outcomes.append(ids)
        else:
            chains = {name: tuple(hasher.hash_blocks(ids)) for name, hasher in hashers.items()}
            outcomes.append((ids, chains))
    return outcomes
