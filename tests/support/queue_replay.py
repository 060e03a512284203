"""The actions of the queue's model on a real server, and what they leave there.

`Replay` has the actions as methods of the same names and arguments. `play` asserts that server and
model reply the same, `compare` that they hold the same.
"""

from __future__ import annotations

from typing import Any, cast

from support.queue_driver import LONG_MS, QueueDriver, end, request_message, tokens
from support.queue_model import (
    CHUNK_TOKENS,
    CREDITS,
    ENDED,
    MAX_CRASHES,
    MAX_ERRORS,
    Action,
    Batch,
    Belief,
    Life,
    Reply,
    World,
    step,
)
from support.queue_moves import is_current
from wire.codec import encode
from wire.ids import BatchId, GroupId, RequestId
from wire.messages import CommitState, TerminalState
from wire.records import ending, read_journal
from wire.scripts import Ending, Progress, Queued, ReclaimReason
from wire.streams import entries

LONG_AGO_MS = 1
"""In place of the time at which something ends or falls due."""

COUNTS = ("fence", "num_crashes", "num_errors", "num_neighbours", "num_journaled")


def name_of(request: int) -> RequestId:
    """A request's id."""
    return RequestId(f"r{request}")


class Replay:
    """A world of the model, and a server in the same state."""

    def __init__(self, queue: QueueDriver, world: World) -> None:
        self.world = world
        self._queue = queue
        self._scripts = queue.scripts
        self._client = queue.client
        self._prefix = queue.keys.prefix
        self._epochs: dict[Life, int] = {}
        self._entry_ids: dict[tuple[int, int | None], bytes] = {}
        self._streams: dict[int, bool] = {}
        self._page: Batch = ()

    async def open(self) -> None:
        """Have an empty server with the groups that are alive from the beginning."""
        await self._client.flushall()
        for (group, epoch), _ in self.world.groups:
            self._epochs[group, epoch] = await self._queue.join(f"g{group}")

    async def play(self, action: Action) -> Reply:
        """Act on the server and in the model; the replies must be the same."""
        reply: Reply = await getattr(self, action.name)(*action.args)
        if action.name == "reclaim" and action.args[2] is not None:
            # Which requests are in a page, and whether it is full, is for the server to say.
            is_full = len(self._page) == len(action.args[2])
            action = action._replace(args=(*action.args[:2], self._page if is_full else None))
        self.world, expected = step(self.world, action)
        assert reply == expected, f"the server replies {reply!r} to {action}, not {expected!r}"
        return reply

    # The actions

    async def submit(self, request: int) -> Reply:
        self._streams.setdefault(request, request % 2 == 1)
        [outcome] = await self._queue.submit(name_of(request), stream=self._streams[request])
        return outcome

    async def cancel(self, request: int) -> Reply:
        return await self._queue.cancel(name_of(request))

    async def replay(self, letter: int, new: int) -> Reply:
        message = request_message(name_of(new))
        outcome = await self._scripts.replay(
            name_of(letter), name_of(new), message, max_queued=1000
        )
        if outcome == "new":
            self._streams[new] = self._streams[letter]
        return outcome

    async def read(self, by: int, request: int) -> None:
        if self.world.records[request].state == "queued":
            queued = await self._queue.queued(name_of(request))
            self._entry_ids[request, queued.fence] = queued.entry_id

    async def assign(self, by: int, life: Life, batch: Batch, exclusive: bool, lost: bool) -> Reply:
        noted = [self._noted(by, request) for request in batch]
        outcome = await self._scripts.assign(
            *self._life(life),
            credits=CREDITS,
            batch_id=BatchId("b"),
            batch=[(queued, queued.fence + 1, b"assignment") for queued in noted],
            exclusive=exclusive,
        )
        # Only `end_reservation` ends one, however slow the test is.
        await self._client.pexpire(self._key(life, "exclusive"), LONG_MS)
        return outcome if isinstance(outcome, str) else _numbers(outcome)

    async def reject(self, by: int, request: int, state: str, dead: bool, lost: bool) -> Reply:
        final = cast("TerminalState", "failed" if dead else state)
        reason = "wire_error" if dead else ""
        rejected = Ending(self._noted(by, request), final, encode(ending(final)), reason)
        return await self._scripts.reject([rejected])

    async def retry(self) -> Reply:
        return await self._queue.retry(
            max_errors=MAX_ERRORS, delay_ms=LONG_MS, max_delay_ms=LONG_MS
        )

    async def reclaim(self, life: Life, how: ReclaimReason, page: Batch | None) -> Reply:
        before = await self._owned(life)
        group, epoch = self._life(life)
        limit = 100 if page is None else len(page)
        counts = await self._queue.reclaim(
            group, epoch, how=how, max_crashes=MAX_CRASHES, limit=limit
        )
        self._page = tuple(sorted(before - await self._owned(life)))
        return counts

    async def register(self, group: int) -> None:
        lives = [epoch for name, epoch in self._epochs if name == group]
        before = max((self._epochs[group, epoch] for epoch in lives), default=0)
        epoch = await self._scripts.register(GroupId(f"g{group}"), model="m", card=b"no card")
        assert epoch > before
        self._epochs[group, max(lives, default=0) + 1] = epoch

    async def beat(self, life: Life, lost: bool) -> Reply:
        group, epoch = self._life(life)
        first = not dict(self.world.groups)[life].joined
        return await self._queue.beat(group, epoch, first=first) is not None

    async def commit(
        self, life: Life, belief: Belief, chunk: bool, state: str, lost: bool
    ) -> Reply:
        request, fence, offset = belief
        progress = Progress(name_of(request), fence)
        if state:
            progress = end(name_of(request), fence, cast("CommitState", state))
        if chunk:
            new = tokens(name_of(request), fence, offset, *range(offset, offset + CHUNK_TOKENS))
            progress = Progress(
                new.request_id,
                fence,
                new.chunk,
                progress.state,
                progress.result,
                offset,
                new.num_tokens,
            )
        return _numbers(await self._scripts.commit(*self._life(life), [progress]))

    async def reconcile(self, life: Life) -> Reply:
        mail = await entries(self._client, self._key(life, "inbox"))
        known = [
            belief.request
            for belief in dict(self.world.groups)[life].believes
            if is_current(self.world, belief)
        ]
        agreed = await self._scripts.reconcile(
            *self._life(life), mail[-1][0] if mail else b"0-0", list(map(name_of, known))
        )
        assert agreed is not None, "all mail is read"
        ends = [count for _, count in sorted(agreed.num_journaled.items())]
        return agreed.num_released, *ends

    async def end_lease(self, life: Life) -> None:
        if dict(self.world.groups)[life].lease == "held":
            member = ":".join(map(str, self._life(life)))
            await self._client.zadd(self._queue.keys.groups, {member: LONG_AGO_MS})

    async def end_delay(self, request: int) -> None:
        due = {name_of(request): LONG_AGO_MS}
        await self._client.zadd(self._queue.keys.delayed, cast("Any", due), xx=True)

    async def end_reservation(self, life: Life) -> None:
        if dict(self.world.groups)[life].alone == "wanted":
            await self._client.delete(self._key(life, "exclusive"))

    async def forget(self, life: Life, belief: Belief) -> None:
        pass  # only the group's own memory

    # What is there

    async def compare(self) -> None:
        """Assert that the server holds what the model's world does."""
        for request in range(len(self.world.records)):
            await self._compare_request(request)
        await self._compare_queue()
        await self._compare_groups()

    async def _compare_request(self, request: int) -> None:
        expected, name = self.world.records[request], name_of(request)
        record = await self._queue.record(name)
        assert bool(record) == bool(expected.state)
        if not record:
            return
        assert record["state"].decode() == expected.state, f"{record} is not {expected}"
        for field in COUNTS:
            assert int(record.get(field, 0)) == getattr(expected, field), f"{field} of {name}"
        owner = expected.owner and ":".join(map(str, self._life(expected.owner)))
        assert record.get("owner", b"").decode() == (owner or "")
        assert ("cancelled" in record) == expected.cancelled
        assert ("error" in record) == expected.error
        assert ("result" in record) == (expected.state in ENDED)
        found = await entries(self._client, self._queue.keys.journal(name))
        ends = [fields[b"state"].decode() for _, fields in found if b"state" in fields]
        assert ends == ([expected.state] if expected.state in ENDED else [])
        # Raises for a gap or a repetition.
        journaled = read_journal(found)
        is_trimmed = expected.by_group and not self._streams[request]
        num_tokens = 0 if is_trimmed else expected.num_journaled
        assert list(journaled.token_ids) == list(range(num_tokens))

    async def _compare_queue(self) -> None:
        world, keys = self.world, self._queue.keys
        queued = await entries(self._client, keys.intakes["standard"])
        found = {fields[b"request_id"].decode(): entry_id for entry_id, fields in queued}
        assert len(found) == len(queued)
        assert found.keys() == {name_of(request) for request, _ in world.intake}
        for name, entry_id in found.items():
            assert (await self._queue.record(name))["entry"] == entry_id
        now_ms, _ = await self._scripts.fleet()
        delayed = cast("Any", await self._client.zrange(keys.delayed, 0, -1, withscores=True))
        dues = {(name.decode(), due <= now_ms) for name, due in delayed}
        assert dues == {(name_of(request), is_due) for request, is_due in world.delayed}
        results = [(name_of(request), state) for request, state in world.results]
        # In no order: what a dead group held is taken from a set.
        assert sorted(await self._queue.ended()) == sorted(results)
        dead_letters = cast("Any", await self._client.zrange(keys.dead_letters, 0, -1))
        letters = {name.decode() for name in dead_letters}
        assert letters == {name_of(request) for request in world.letters}
        hashes = await self._client.keys(keys.dead_letter(RequestId("*")).replace("{", "[{]"))
        assert len(hashes) == len(letters)

    async def _compare_groups(self) -> None:
        now_ms, fleet = await self._scripts.fleet()
        found = {(entry.group_id, entry.epoch): entry for entry in fleet}
        for life, group in self.world.groups:
            assert await self._owned(life) == group.owned
            entry = found.pop(self._life(life), None)
            assert (entry is not None) == (group.lease in ("held", "over", "dead"))
            if entry is not None:
                assert (entry.lease_until_ms > now_ms) == (group.lease == "held")
                assert entry.num_owned == len(group.owned)
                is_reserved = group.alone == "wanted"
                assert entry.exclusive == (is_reserved or bool(group.alone and group.owned))
        assert not found

    # Names

    def _life(self, life: Life) -> tuple[GroupId, int]:
        return GroupId(f"g{life[0]}"), self._epochs[life]

    def _key(self, life: Life, what: str) -> str:
        group, epoch = self._life(life)
        return f"{self._prefix}:group:{group}:{epoch}:{what}"

    async def _owned(self, life: Life) -> frozenset[int]:
        names = await cast("Any", self._client.smembers(self._key(life, "owned")))
        return frozenset(_numbers(name.decode() for name in names))

    def _noted(self, by: int, request: int) -> Queued:
        """What a scheduler once read; of what it never saw, something that never was."""
        fence = dict(self.world.notes).get((by, request), -1)
        entry_id = self._entry_ids.get((request, fence), b"0-1")
        return Queued(name_of(request), fence, "standard", entry_id)


def _numbers(names: Any) -> Batch:
    return tuple(int(name.removeprefix("r")) for name in names)
