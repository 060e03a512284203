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
from scheduler.directory import Directory
from scheduler.fleet import Fleet
from scheduler.intake import Intake
from scheduler.policy.bisecting import plan_suspects
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.planning import BatchLimits, PlannedBatch, Planner
from scheduler.salts import TenantSalts
from wire.codec import encode
from wire.ids import BatchId
from wire.messages import Assignment, PrefixSource
from wire.scripts import Queued, Scripts

log = structlog.get_logger(__name__)

ASK_AGAIN_S = 1.0
"""A group that is kept from being filled again is so for three times as long (assign.lua)."""


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
        self._ask_again_s = 0.0
        self._directory = Directory(scripts)

    async def dispatch(self) -> None:
        """Send out what can go; if nothing can, wait for something to change."""
        self._backlog.to_dispatch.clear()
        sent = await self._dispatch_suspects()
        for model, pending in list(self._backlog.pending.items()):
            unsent = deque(await self._plan(model, pending))
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

    async def _plan(self, model: str, pending: PendingRequests) -> list[PlannedBatch]:
        planner, fleet = self._planner(model), self._fleet.view.serving(model)
        next_up = planner.next_up(pending, fleet, time.monotonic())
        cached = await self._directory.ask(next_up, fleet)
        # The fleet may have been looked at anew, and requests may have come and gone meanwhile.
        fleet = self._fleet.view.serving(model)
        return planner.plan(pending, fleet, time.monotonic(), cached)

    async def _dispatch_suspects(self) -> bool:
        """Send out what must have a group for itself, a batch for each model."""
        sent = False
        ask_again = time.monotonic() >= self._ask_again_s
        for model, suspects in list(self._backlog.suspects.items()):
            fleet = self._fleet.view.serving(model)
            batch = plan_suspects(suspects, fleet, self._limits, ask_again=ask_again)
            if batch is None:
                continue
            self._ask_again_s = time.monotonic() + ASK_AGAIN_S
            try:
                sent = await self._send(batch) or sent
            except BaseException:
                suspects.give_back(batch.requests)
                raise
        return sent

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

    async def _send(self, batch: PlannedBatch) -> bool:
        """Hand a batch over. Returns False when the group did not take it."""
        live: list[ReadyRequest] = []
        now_ms = self._fleet.server_ms()
        for request in batch.requests:
            if request.is_late(now_ms):
                await self._intake.end_late(request.queued)
            else:
                live.append(request)
        if not live:
            return True
        status = batch.group.status
        batch_id = BatchId(os.urandom(8).hex())
        outcome = await self._scripts.assign(
            status.group_id,
            status.epoch,
            credits=status.credits,
            batch_id=batch_id,
            batch=[
                self._assignment(request, batch.sources.get(request.request_id), now_ms)
                for request in live
            ],
            exclusive=batch.exclusive,
        )
        if isinstance(outcome, str):
            # Until the fleet is looked at again.
            batch.group.num_owned = max(batch.group.num_owned, status.credits)
            batch.group.exclusive = batch.exclusive
            self._backlog.queue_of(live[0]).give_back(live)
            log.debug("batch refused", group_id=status.group_id, outcome=outcome)
            return False
        for request in live:
            self._intake.settle(request.queued)
        log.debug(
            "batch sent",
            batch_id=batch_id,
            group_id=status.group_id,
            num_requests=len(outcome),
            num_tokens=batch.num_tokens,
            exclusive=batch.exclusive,
        )
        return True

    def _assignment(
        self, ready: ReadyRequest, source: PrefixSource | None, server_ms: int
    ) -> tuple[Queued, int, bytes]:
        # By the clock, so that it does not come again on a server that has lost its last second.
        fence = max(ready.queued.fence + 1, server_ms)
        message = encode(
            Assignment(
                request_id=ready.request_id,
                fence=fence,
                prompt_token_ids=ready.prompt_token_ids,
                sampling=ready.request.sampling,
                stream=ready.request.stream,
                cache_salt=self._salts.of(ready.request.tenant),
                deadline_ms=ready.deadline_ms,
                generated=ready.journaled.token_ids,
                generated_text=ready.journaled.text,
                generated_logprobs=ready.journaled.logprobs,
                prefix_source=source,
            )
        )
        return ready.queued, fence, message
