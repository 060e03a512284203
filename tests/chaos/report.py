"""What came of a run, for people and, in one JSON line, for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from chaos.befall import Casualty, Fate
from chaos.cast import Service
from chaos.clients import Clients
from chaos.faults import Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of a run; `violations` is empty if all went well."""

    command: str
    faults: Sequence[Fault]
    violations: Sequence[str]
    num_faults: Mapping[str, int]
    num_missed: int
    num_lost_replies: int
    states: Mapping[str, int]
    num_requests: int
    num_tokens: int
    num_resubmitted: int
    num_redelivered: int
    exits: Mapping[str, Mapping[int, int]]
    casualties: Sequence[Casualty]
    took_s: float
    calm_s: float

    @classmethod
    def of(
        cls,
        command: str,
        fate: Fate,
        clients: Clients,
        *,
        services: Mapping[str, Service],
        num_lost_replies: int,
        faults: Sequence[Fault],
        took_s: float,
        calm_s: float,
        violations: Sequence[str],
    ) -> Self:
        """Put it together."""
        results = [*clients.results.values(), *clients.forgotten]
        return cls(
            command=command,
            faults=faults,
            violations=violations,
            num_faults=fate.num_faults,
            num_missed=fate.num_missed,
            num_lost_replies=num_lost_replies,
            states=Counter(result.state for result in results),
            num_requests=len(results),
            num_tokens=sum(len(result.token_ids) for result in results),
            num_resubmitted=clients.num_resubmitted,
            num_redelivered=clients.deliveries.total() - len(clients.deliveries),
            exits={name: service.exits for name, service in services.items() if service.exits},
            casualties=fate.casualties,
            took_s=took_s,
            calm_s=calm_s,
        )

    def __str__(self) -> str:
        """Some lines, the last of them JSON."""
        figures = {
            "requests": self.num_requests,
            "tokens": self.num_tokens,
            "faults": sum(self.num_faults.values()),
            "lost_replies": self.num_lost_replies,
            "redelivered": self.num_redelivered,
            "resubmitted": self.num_resubmitted,
            "kills": len(self.casualties),
            "taken_back_within_s": self._longest_s(disturbed=False),
            "taken_back_within_s_without_server": self._longest_s(disturbed=True),
            "took_s": round(self.took_s, 1),
            "calm_s": round(self.calm_s, 1),
            "violations": len(self.violations),
        }
        return "\n".join(
            (
                *(f"VIOLATION {violation}" for violation in self.violations),
                *(f"{number:5} {kind}" for kind, number in sorted(self.num_faults.items())),
                f"{self.num_missed:5} of them found nobody there",
                f"ends: {dict(self.states)}; exits: {_plain(self.exits)}",
                f"again: {self.command}",
                json.dumps(figures),
            )
        )

    def _longest_s(self, *, disturbed: bool) -> float:
        """How long at most a dead group's requests were left with it."""
        took_s = [c.taken_back_s or 0.0 for c in self.casualties if c.is_disturbed == disturbed]
        return round(max(took_s, default=0.0), 2)


def _plain(exits: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    return {name: dict(statuses) for name, statuses in exits.items()}
