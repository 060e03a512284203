"""From pending requests to batches in the groups' inboxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque

import structlog

from scheduler.backlog import Backlog
from scheduler.catalog import ModelCatalog
from scheduler.fleet import Fleet
from scheduler.intake import Intake
from scheduler.policy.pending import ReadyRequest
from scheduler.policy.planning import BatchLimits, PlannedBatch, Planner
from scheduler.salts import TenantSalts
from wire.codec import encode
from wire.ids import BatchId
from wire.messages import Assignment
from wire.scripts import Scripts

log = structlog.get_logger(__name__)


class Dispatcher:
    """Sends out what the planner decides."""

    def __init__(
        self,
        backlog: Backlog,
        scripts: Scripts,
        limits: BatchLimits,
        *,
        intake: Intake,
        catalog: ModelCatalog,
        fleet: Fleet,
        salts: TenantSalts,
    ) -> None:
        self._backlog = backlog
        self._scripts = scripts
        self._limits = limits
        self._intake = intake
        self._catalog = catalog
        self._fleet = fleet
        self._salts = salts
        self._planners: dict[str, Planner] = {}

    async def dispatch(self) -> None:
        """Send out what can go; if nothing can, wait for something to change."""
        self._backlog.to_dispatch.clear()
        sent = False
        for model, pending in list(self._backlog.pending.items()):
            fleet = self._fleet.view.serving(model)
            unsent = deque(self._planner(model).plan(pending, fleet, time.monotonic()))
            sent = sent or bool(unsent)
            try:
                while unsent:
                    await self._send(unsent[0])
                    unsent.popleft()
            except BaseException:
                # Whether the first was sent is unknown; if it was, the fencing tokens will tell.
                for batch in unsent:
                    pending.give_back(batch.requests)
                raise
        if not sent:
            waits = self._backlog.num_pending > 0
            with contextlib.suppress(TimeoutError):
                # Requests that only wait for company must not wait for longer than agreed.
                async with asyncio.timeout(self._limits.max_wait_s + 0.001 if waits else None):
                    await self._backlog.to_dispatch.wait()

    def forget_group(self, key: str) -> None:
        """A group is gone, and its cache with it."""
        for planner in self._planners.values():
            planner.forget_group(key)

    def _planner(self, model: str) -> Planner:
        planner = self._planners.get(model)
        if planner is None:
            tokenizer = self._catalog.get(model)
            assert tokenizer is not None
            planner = Planner(self._limits, tokenizer.card.block_size)
            self._planners[model] = planner
        return planner

    async def _send(self, batch: PlannedBatch) -> None:
        live: list[ReadyRequest] = []
        now_ms = self._fleet.server_ms()
        for request in batch.requests:
            if request.is_late(now_ms):
                await self._intake.end_late(request.queued)
            else:
                live.append(request)
        if not live:
            return
        status = batch.group.status
        batch_id = BatchId(os.urandom(8).hex())
        outcome = await self._scripts.assign(
            status.group_id,
            status.epoch,
            credits=status.credits,
            batch_id=batch_id,
            batch=[(request.queued, self._assignment(request)) for request in live],
        )
        if isinstance(outcome, str):
            batch.group.num_owned = status.credits  # until the fleet is looked at again
            self._backlog.pending[live[0].model].give_back(live)
            log.debug("batch refused", group_id=status.group_id, outcome=outcome)
            return
        for request in live:
            self._intake.settle(request.queued)
        log.debug(
            "batch sent",
            batch_id=batch_id,
            group_id=status.group_id,
            num_requests=len(outcome),
            num_tokens=batch.num_tokens,
        )

    def _assignment(self, ready: ReadyRequest) -> bytes:
        return encode(
            Assignment(
                request_id=ready.request_id,
                fence=ready.queued.fence + 1,
                prompt_token_ids=ready.prompt_token_ids,
                sampling=ready.request.sampling,
                stream=ready.request.stream,
                cache_salt=self._salts.of(ready.request.tenant),
                deadline_ms=ready.deadline_ms,
                generated=ready.journaled.token_ids,
                generated_text=ready.journaled.text,
                generated_logprobs=ready.journaled.logprobs,
            )
        )
