"""The scheduler's main loops, and how they fit together.

    intake streams -> read -> [arrived] -> prepare -> [pending, by model] -> dispatch -> groups
                                              ^                                ^
                                         catalog (tokenizers)          fleet (groups' credits)

All state belongs to this one event loop; what takes long (tokenizing) runs in a thread on values.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence

import structlog
from redis.asyncio import Redis

from cache.prefix_hash import PrefixHasher
from scheduler.catalog import ModelCatalog
from scheduler.fleet import Fleet
from scheduler.intake import Arrival, Intake
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.planning import BatchLimits, PlannedBatch, Planner
from scheduler.tokenization import PromptTokenizer
from service.lifecycle import shutdown_signals
from service.resilience import one_error, repeat, sleep_unless
from service.settings import SchedulerSettings
from wire.client import connect, ping, redis_errors
from wire.codec import encode
from wire.errors import ForebayError, InvalidRequest, RequestExpired
from wire.ids import BatchId, BlockHash, TokenIds
from wire.keys import LIVE_TTL_MS, Keys
from wire.messages import PRIORITIES, Assignment, Request, TerminalState
from wire.records import ending
from wire.scripts import Queued, Scripts

log = structlog.get_logger(__name__)

TOKENIZE_AT_ONCE = 64
BUSY_POLL_S = 0.02
IDLE_POLL_S = 0.25
TAKE_OVER_EVERY_S = 1.0
STOP_TIMEOUT_S = 10.0


async def run(settings: SchedulerSettings) -> None:
    """Schedule until SIGTERM or SIGINT; what is queued stays queued for the next scheduler.

    Raises ServerUnreachable when the server does not answer at the start, or refuses us later.
    """
    url = settings.redis_url.get_secret_value()
    async with shutdown_signals() as stop, open_scheduler(settings) as scheduler:
        with redis_errors(url), one_error():
            await scheduler.run(stop)


@contextlib.asynccontextmanager
async def open_scheduler(settings: SchedulerSettings) -> AsyncIterator[SchedulerService]:
    """A scheduler with its connections, which are closed at the end."""
    url = settings.redis_url.get_secret_value()
    client, blocking_client = connect(url), connect(url, blocking=True)
    try:
        await ping(client, url)
        keys = Keys(settings.namespace)
        scripts = Scripts(client, keys)
        yield SchedulerService(
            settings,
            scripts,
            intake=Intake(client, blocking_client, keys),
            fleet=Fleet(scripts, max_attempts=settings.max_attempts),
            catalog=ModelCatalog(client, keys),
            salt=await _shared_salt(client, keys),
        )
    finally:
        await client.aclose()
        await blocking_client.aclose()


class SchedulerService:
    """Moves requests from the intake to the groups."""

    def __init__(
        self,
        settings: SchedulerSettings,
        scripts: Scripts,
        *,
        intake: Intake,
        fleet: Fleet,
        catalog: ModelCatalog,
        salt: bytes,
    ) -> None:
        self._settings = settings
        self._scripts = scripts
        self._intake = intake
        self._fleet = fleet
        self._catalog = catalog
        self._salt = salt
        self._limits = BatchLimits(
            max_tokens=settings.max_batch_tokens,
            max_requests=settings.max_batch_requests,
            max_wait_s=settings.max_batch_wait_ms / 1000,
        )
        self._arrived: deque[Arrival] = deque()
        self._pending: dict[str, PendingRequests] = defaultdict(PendingRequests)
        self._planners: dict[str, Planner] = {}
        self._cards_to_read: set[str] = set()
        self._to_prepare = asyncio.Event()
        self._to_dispatch = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Run all loops until `stop` is set."""
        await self._intake.open()
        log.info("scheduler started", namespace=self._settings.namespace)
        loops = {
            "read": (self._read, self._read_again),
            "prepare": (self._prepare, None),
            "dispatch": (self._dispatch, None),
            "watch_fleet": (self._watch_fleet, None),
            "expire": (self._expire, None),
            "take_over": (self._take_over, self._read_again),
        }
        self._stop = stop
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(
                    repeat(name, step, stop=stop, on_reconnect=on_reconnect), name=name
                )
                for name, (step, on_reconnect) in loops.items()
            ]
            await stop.wait()
            for event in (self._to_prepare, self._to_dispatch):
                event.set()
            # Every step ends by itself within a second or two; a server that hangs must not
            # keep us from leaving.
            _, late = await asyncio.wait(running, timeout=STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
        await self._intake.close()
        log.info("scheduler stopped", num_left_queued=len(self._arrived) + self._num_pending)

    @property
    def _num_pending(self) -> int:
        return sum(len(pending) for pending in self._pending.values())

    # Read

    async def _read(self) -> None:
        # Each class has a window of its own: a flood of one must not keep another out.
        window = self._settings.window
        room = dict.fromkeys(PRIORITIES, window)
        for arrival in self._arrived:
            room[arrival.queued.priority] -= 1
        for pending in self._pending.values():
            for priority in PRIORITIES:
                room[priority] -= pending.count(priority)
        if any(n > 0 for n in room.values()):
            self._arrive(await self._intake.read(room))
        else:
            await sleep_unless(self._stop, BUSY_POLL_S)

    async def _read_again(self) -> None:
        self._arrive(await self._intake.read_again())

    async def _take_over(self) -> None:
        await self._intake.heartbeat()
        num_taken = 0
        async for arrivals in self._intake.take_over():
            self._arrive(arrivals)
            num_taken += len(arrivals)
        if not num_taken:
            await sleep_unless(self._stop, TAKE_OVER_EVERY_S)

    def _arrive(self, arrivals: Sequence[Arrival]) -> None:
        if arrivals:
            self._arrived.extend(arrivals)
            self._to_prepare.set()

    # Prepare

    async def _prepare(self) -> None:
        await self._to_prepare.wait()
        self._to_prepare.clear()
        waiting: list[Arrival] = []
        while self._arrived and not self._stop.is_set():
            count = min(TOKENIZE_AT_ONCE, len(self._arrived))
            arrivals = [self._arrived.popleft() for _ in range(count)]
            try:
                waiting += await self._prepare_some(arrivals)
            except BaseException:
                # Those that were done already are sent twice; their fencing tokens sort it out.
                self._arrived.extendleft(reversed(waiting + arrivals))
                raise
        # They are looked at again when a group joins.
        self._arrived.extendleft(reversed(waiting))

    async def _prepare_some(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Tokenize, or reject. Returns those whose model nobody serves at the moment."""
        by_model: dict[str, list[tuple[Arrival, Request]]] = defaultdict(list)
        waiting: list[Arrival] = []
        for arrival in arrivals:
            if isinstance(arrival.request, ForebayError):
                await self._reject(arrival.queued, "failed", arrival.request)
                continue
            model = self._model_of(arrival.request)
            if isinstance(model, ForebayError):
                await self._reject(arrival.queued, "failed", model)
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

    async def _tokenize(self, model: str, arrivals: list[tuple[Arrival, Request]]) -> None:
        tokenizer = self._catalog.get(model)
        assert tokenizer is not None
        outcomes = await asyncio.to_thread(
            _tokenize_and_hash,
            tokenizer,
            [
                (request, self._catalog.hasher(model, self._tenant_salt(request.tenant)))
                for _, request in arrivals
            ],
        )
        for (arrival, request), outcome in zip(arrivals, outcomes, strict=True):
            if isinstance(outcome, ForebayError):
                await self._reject(arrival.queued, "failed", outcome)
                continue
            prompt_token_ids, block_hashes = outcome
            self._pending[model].add(
                ReadyRequest(
                    arrival.queued,
                    request,
                    model,
                    prompt_token_ids,
                    block_hashes,
                    arrival.journaled,
                    ready_s=time.monotonic(),
                    deadline_ms=arrival.deadline_ms,
                )
            )
        self._to_dispatch.set()

    def _tenant_salt(self, tenant: str) -> bytes:
        return hashlib.blake2b(tenant.encode(), key=self._salt, digest_size=16).digest()

    # Dispatch

    async def _dispatch(self) -> None:
        """Send out what can go; then wait for something to change."""
        self._to_dispatch.clear()
        sent = False
        for model, pending in list(self._pending.items()):
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
            waits = self._num_pending > 0
            with contextlib.suppress(TimeoutError):
                # Requests that only wait for company must not wait for longer than agreed.
                async with asyncio.timeout(self._limits.max_wait_s + 0.001 if waits else None):
                    await self._to_dispatch.wait()

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
                await self._reject_late(request.queued)
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
            self._pending[live[0].model].give_back(live)
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
                cache_salt=self._tenant_salt(ready.request.tenant),
                deadline_ms=ready.deadline_ms,
                generated=ready.journaled.token_ids,
                generated_text=ready.journaled.text,
                generated_logprobs=ready.journaled.logprobs,
            )
        )

    async def _expire(self) -> None:
        """End what its deadline has caught up with while nobody could take it."""
        now_ms = self._fleet.server_ms()
        waiting: list[Arrival | ReadyRequest] = [*self._arrived]
        for pending in self._pending.values():
            waiting += pending
        late = {item.queued for item in waiting if item.is_late(now_ms)}
        for queued in late:
            await self._reject_late(queued)
        if late:
            # Afterwards, so that an error loses none. One that is sent in the meantime was ended
            # already, and is left out of its batch.
            self._arrived = deque(item for item in self._arrived if item.queued not in late)
            for pending in self._pending.values():
                pending.discard(late)
        await sleep_unless(self._stop, IDLE_POLL_S)

    async def _reject_late(self, queued: Queued) -> None:
        expired = RequestExpired("the deadline passed while the request was queued")
        await self._reject(queued, "expired", expired)

    async def _reject(self, queued: Queued, state: TerminalState, error: ForebayError) -> None:
        log.info("request ended in the queue", request_id=queued.request_id, reason=error.code)
        await self._scripts.reject([(queued, state, encode(ending(state, error)))])
        self._intake.settle(queued)

    # Watch

    async def _watch_fleet(self) -> None:
        joined, left = await self._fleet.refresh()
        for key in left:
            for planner in self._planners.values():
                planner.forget_group(key)
        # Remembered until they were read: a group joins only once.
        self._cards_to_read.update(self._fleet.view.groups[key].status.model for key in joined)
        while self._cards_to_read:
            model = min(self._cards_to_read)
            await self._catalog.refresh(model)
            self._cards_to_read.discard(model)
            self._to_prepare.set()
        if self._num_pending:
            self._to_dispatch.set()
        await sleep_unless(
            self._stop, BUSY_POLL_S if self._num_pending or self._arrived else IDLE_POLL_S
        )


def _tokenize_and_hash(
    tokenizer: PromptTokenizer, requests: list[tuple[Request, PrefixHasher]]
) -> list[tuple[TokenIds, tuple[BlockHash, ...]] | ForebayError]:
    """Runs in a thread: token ids and block hashes of each prompt, or what is wrong with it."""
    outcomes: list[tuple[TokenIds, tuple[BlockHash, ...]] | ForebayError] = []
    tokenized = tokenizer.tokenize([request for request, _ in requests])
    for (_, hasher), ids in zip(requests, tokenized, strict=True):
        if isinstance(ids, ForebayError):
            outcomes.append(ids)
        else:
            outcomes.append((ids, tuple(hasher.hash_blocks(ids))))
    return outcomes


async def _shared_salt(client: Redis, keys: Keys) -> bytes:
    """The fleet's secret, made by whichever scheduler comes first."""
    await client.set(keys.salt, os.urandom(32), px=LIVE_TTL_MS, nx=True)
    salt = await client.get(keys.salt)
    assert isinstance(salt, bytes)
    return salt
