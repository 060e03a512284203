"""How often a scheduler looks at the fleet."""

from __future__ import annotations

from scheduler.policy.fleet_view import FleetView, GroupView
from scheduler.policy.looking import BUSY_S, IDLE_S, JOINING_S, SLOW_S, Looking
from wire.ids import GroupId
from wire.messages import GroupStatus

CREDITS = 16


def fleet(*, num_free: int) -> FleetView:
    status = GroupStatus(GroupId("g"), 1, "m", 1, CREDITS, "healthy")
    return FleetView({"g:1": GroupView(status, CREDITS - num_free)})


def test_it_looks_seldom_while_nothing_waits() -> None:
    assert Looking().next_s(num_waiting=0, fleet=fleet(num_free=CREDITS)) == IDLE_S
    assert Looking().next_s(num_waiting=1, fleet=FleetView({})) == JOINING_S


def test_it_looks_as_often_as_room_comes() -> None:
    looking = Looking()
    slow = [looking.next_s(num_waiting=9, fleet=fleet(num_free=1)) for _ in range(8)]
    assert slow == sorted(slow)
    assert slow[-1] == SLOW_S
    quick = [looking.next_s(num_waiting=9, fleet=fleet(num_free=CREDITS)) for _ in range(8)]
    assert quick == sorted(quick, reverse=True)
    assert quick[-1] == BUSY_S


def test_it_starts_anew_with_new_work() -> None:
    looking = Looking()
    for _ in range(8):
        looking.next_s(num_waiting=9, fleet=fleet(num_free=0))
    looking.next_s(num_waiting=0, fleet=fleet(num_free=0))
    assert looking.next_s(num_waiting=9, fleet=fleet(num_free=CREDITS)) == BUSY_S
