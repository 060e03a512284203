"""One run: the job from its submission to its end, with the faults of a scenario, and the checks.

    producer, reader and consumer are done ──▶ stop scheduler and worker ──▶ check ──▶ wipe

Runs are independent of each other, each in a database of its own, so that some can share a server
and an event loop: a good part of a run is waiting, for leases to end and for reads that block.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from crash_points.checks import Findings, check_run
from crash_points.points import ROLES, Scenario
from crash_points.processes import Role
from crash_points.programs import PROGRAMS, Run
from wire.client import connect

NAMESPACE = "crash"
TIMEOUT_S = 60.0
REGISTER = "EVALSHA register"

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run, in types that JSON has.

    `num_calls` has, for each role and each of its lives, the number of calls of each kind.
    """

    scenario: str
    problems: list[str]
    num_unreached: int
    had_false_alarm: bool
    most_streamed_again: int
    most_unstreamed_again: int
    num_calls: dict[str, list[dict[str, int]]]
    took_s: float


async def run_scenario(scenario: Scenario, server_url: str, database: int) -> Outcome:
    """Run the job once, in a database that nobody else uses, check it, and leave nothing there."""
    started_s = time.monotonic()
    url = f"{server_url}?db={database}"
    async with connect(url) as client:
        await client.flushdb()
        run, roles, problem = await run_job(scenario, url)
        if problem is None:
            lives = roles["worker"].lives
            findings = await check_run(
                run,
                client,
                num_worker_deaths=sum(life.is_dead for life in lives),
                num_rejoins=sum(max(0, life.num_calls[REGISTER] - 1) for life in lives),
            )
        else:
            findings = Findings([problem])
        await client.flushdb()
    again = findings.regenerated
    return Outcome(
        str(scenario),
        findings.problems,
        _num_unreached(scenario, roles),
        findings.had_false_alarm,
        again.most_streamed,
        again.most_unstreamed,
        {name: [dict(life.num_calls) for life in role.lives] for name, role in roles.items()},
        round(time.monotonic() - started_s, 3),
    )


async def run_job(scenario: Scenario, url: str) -> tuple[Run, dict[str, Role], str | None]:
    """Run the job once. Returns what became of it, and what kept it from its end, if anything did.

    `url` has options already.
    """
    run = Run(NAMESPACE)
    roles = _roles(run, scenario, url)
    return run, roles, await _run_roles(run, roles)


def _roles(run: Run, scenario: Scenario, url: str) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    number = next(_numbers)

    def on_death(role: str, life: int) -> None:
        for other in scenario.dying_with(role, life):
            roles[other].kill()

    for name in ROLES:
        roles[name] = Role(
            name,
            partial(PROGRAMS[name], run),
            url=url,
            prefix=f"run{number}",
            faults=scenario.faults_of(name),
            on_death=partial(on_death, name),
        )
    return roles


async def _run_roles(run: Run, roles: Mapping[str, Role]) -> str | None:
    """Run all to their end. Returns what kept them from it, if something did."""
    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            users = [
                tasks.create_task(roles[name].run()) for name in ("producer", "reader", "consumer")
            ]
            for name in ("scheduler", "worker"):
                tasks.create_task(roles[name].run())
            await asyncio.wait(users)
            run.stop.set()
    except TimeoutError:
        waiting = ", ".join(name for name, role in roles.items() if not role.is_done)
        return f"after {TIMEOUT_S:g} s these were not done: {waiting}"
    except BaseExceptionGroup as group:
        return "; ".join(f"{type(error).__name__}: {error}" for error in _leaves(group))
    return None


def _num_unreached(scenario: Scenario, roles: Mapping[str, Role]) -> int:
    """How many of the points were not struck, as their process made fewer calls this time."""
    num_unreached = 0
    for index, point in enumerate(scenario.points):
        lives = roles[point.role].lives[scenario.life_of(index) - 1 :][:1]
        num_unreached += not any((point.kind, point.nth) in life.struck for life in lives)
    return num_unreached


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
