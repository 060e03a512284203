"""The dispatcher between a backlog that goes on changing and the groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from scheduler.backlog import Backlog
from scheduler.dispatcher import Dispatcher
from scheduler.policy.bisecting import SUSPECT_AFTER_CRASHES
from scheduler.policy.planning import BatchLimits
from scheduler.salts import TenantSalts
from support.ready_requests import fleet, group, ready
from wire.ids import RequestId


class LiveFleet:
    """A fleet of two groups, each for a model of its own."""

    view = fleet(group("g", model="m"), group("h", model="n"))

    def server_ms(self) -> int:
        return 0


class LiveIntake:
    def settle(self, queued: object) -> None:
        """Nothing is held here."""


class SlowScripts:
    """While a batch is handed over, the preparer gets on."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self.assigned: list[RequestId] = []

    async def assign(self, *_: Any, batch: Any, **__: Any) -> list[RequestId]:
        self._backlog.ready(suspect("n"))
        self.assigned += [queued.request_id for queued, _, _ in batch]
        return self.assigned


def suspect(model: str) -> Any:
    return replace(ready(), model=model, num_crashes=SUSPECT_AFTER_CRASHES)


async def test_a_suspect_of_another_model_may_come_while_one_is_sent() -> None:
    backlog = Backlog()
    first = suspect("m")
    backlog.ready(first)
    scripts = SlowScripts(backlog)
    dispatcher = Dispatcher(
        backlog,
        cast("Any", scripts),
        BatchLimits(max_tokens=100, max_requests=8, max_wait_s=0.0),
        intake=cast("Any", LiveIntake()),
        catalog=cast("Any", None),
        fleet=cast("Any", LiveFleet()),
        salts=TenantSalts(bytes(32)),
    )
    await dispatcher.dispatch()
    assert scripts.assigned == [first.request_id]
    assert len(backlog.suspects["n"]) == 1
