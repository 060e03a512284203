"""Which request goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.pending import HEAD_START_S, PendingRequests
from support.ready_requests import ready
from wire.messages import PRIORITIES, Priority


def names(pending: PendingRequests, limit: int = 100) -> list[str]:
    return [request.request_id for request in pending.take(limit)]


def filled(*entries: tuple[str, Priority, float]) -> PendingRequests:
    pending = PendingRequests()
    for name, priority, at_s in entries:
        pending.add(ready(name=name, priority=priority, at_s=at_s))
    return pending


def test_first_come_first_served_within_a_class() -> None:
    pending = filled(("a", "batch", 0.0), ("b", "batch", 1.0), ("c", "batch", 1.0))
    assert names(pending) == ["a", "b", "c"]


def test_a_higher_class_overtakes_what_came_within_its_head_start() -> None:
    pending = filled(
        ("batch", "batch", 0.0),
        ("standard", "standard", 24.0),
        ("early", "interactive", 28.9),
        ("late", "interactive", 30.1),
    )
    assert names(pending) == ["early", "standard", "batch", "late"]


def test_nothing_starves_under_an_endless_load_of_a_higher_class() -> None:
    pending = filled(("patient", "batch", 0.0))
    for second in range(100):
        for _ in range(3):
            pending.add(ready(priority="interactive", at_s=float(second)))
        if "patient" in names(pending, limit=2):
            break
    # The 100 interactive requests of the 30 s head start are served at 2 of 3 per second.
    assert second <= HEAD_START_S["batch"] * 3 / 2 + 1
    assert second >= HEAD_START_S["batch"]


def test_what_is_given_back_finds_its_old_place() -> None:
    pending = filled(("a", "standard", 0.0), ("b", "standard", 1.0), ("c", "standard", 2.0))
    pending.give_back(pending.take(2))
    assert names(pending) == ["a", "b", "c"]


def test_the_wait_is_that_of_the_first_in_line() -> None:
    pending = filled(("a", "batch", 0.0), ("b", "interactive", 2.0))
    assert pending.oldest_wait_s(5.0) == 3.0
    assert PendingRequests().oldest_wait_s(5.0) == 0.0


def test_discarded_requests_are_gone_and_the_order_stays() -> None:
    pending = PendingRequests()
    requests = [ready(name=name, at_s=at_s) for at_s, name in enumerate("abcd")]
    for request in reversed(requests):
        pending.add(request)
    pending.discard({requests[0].queued, requests[2].queued, ready().queued})
    assert len(pending) == pending.count("standard") == 2
    assert names(pending) == ["b", "d"]


def test_a_deadline_is_reached_when_it_is_there() -> None:
    assert not ready().is_late(10**15)
    assert [ready(deadline_ms=1000).is_late(ms) for ms in (999, 1000)] == [False, True]


@given(
    st.lists(st.tuples(st.sampled_from(PRIORITIES), st.floats(0, 100)), max_size=30),
    st.lists(st.integers(0, 10), max_size=5),
)
def test_counts_by_class_add_up(arrivals: list[tuple[Priority, float]], takes: list[int]) -> None:
    pending = PendingRequests()
    for priority, at_s in arrivals:
        pending.add(ready(priority=priority, at_s=at_s))
    for limit in takes:
        taken = pending.take(limit)
        due = [request.submitted_s + HEAD_START_S[request.queued.priority] for request in taken]
        assert due == sorted(due)
        pending.give_back(taken[: limit // 2])
        assert sum(map(pending.count, PRIORITIES)) == len(pending) == len(list(pending))
