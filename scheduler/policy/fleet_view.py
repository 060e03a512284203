"""The fleet as the policies see it: values, no connections."""

from __future__ import annotations

from dataclasses import dataclass

from wire.ids import GroupId
from wire.messages import GroupStatus


@dataclass(slots=True)
class GroupView:
    """One live group. `num_owned` counts the requests that it holds, running and waiting.

    One that is `late` has missed a heartbeat; one that is `exclusive` has what it holds, or is to
    hold next, for itself. Neither is sent anything else.
    """

    status: GroupStatus
    num_owned: int
    late: bool = False
    exclusive: bool = False

    @property
    def group_id(self) -> GroupId:
        """The group's name."""
        return self.status.group_id

    @property
    def key(self) -> str:
        """The group in this life: a restarted one has another epoch and an empty cache."""
        return f"{self.status.group_id}:{self.status.epoch}"

    @property
    def room(self) -> int:
        """How many requests it can be sent now."""
        if self.status.state != "healthy" or self.late or self.exclusive:
            return 0
        return max(0, self.status.credits - self.num_owned)


@dataclass(slots=True)
class FleetView:
    """All live groups, and the server's time when they were looked at."""

    groups: dict[str, GroupView]
    server_ms: int = 0

    @property
    def models(self) -> frozenset[str]:
        """Names of the models that somebody serves."""
        return frozenset(group.status.model for group in self.groups.values())

    @property
    def room(self) -> int:
        """How many requests the fleet can be sent now."""
        return sum(group.room for group in self.groups.values())

    def cache_formats(self, model: str) -> frozenset[str]:
        """What the cached blocks of a model are made of: one name, if its groups are all alike."""
        return frozenset(
            group.status.cache_format
            for group in self.groups.values()
            if group.status.model == model
        )

    def serving(self, model: str) -> FleetView:
        """The part of the fleet that serves a model; the groups are the same objects."""
        serving = {key: group for key, group in self.groups.items() if group.status.model == model}
        return FleetView(serving, self.server_ms)
