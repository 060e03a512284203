"""When ranks count as hung, and what follows when they are lost: policy, on a clock of numbers."""

from __future__ import annotations

from gpu_worker.hang_watch import MAX_GAP_S, HangWatch
from gpu_worker.restarts import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    MAX_FAILED_STARTS,
    SETTLED_AFTER_S,
    RestartPolicy,
)

# Restarts


def test_ranks_that_never_came_up_are_not_tried_again() -> None:
    assert RestartPolicy().lost(now_s=3.0) is None


def test_each_loss_soon_after_another_doubles_the_wait_up_to_a_limit() -> None:
    policy, delays = RestartPolicy(), []
    for now_s in range(9):
        policy.ready(now_s)
        delays.append(policy.lost(now_s))
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert policy.num_restarts == 9


def test_ranks_that_have_proved_themselves_are_started_again_soon() -> None:
    policy = RestartPolicy()
    for now_s in range(5):
        policy.ready(now_s)
        policy.lost(now_s)
    policy.ready(100.0)
    policy.answered()
    assert policy.lost(101.0) == FIRST_DELAY_S
    policy.ready(102.0)
    assert policy.lost(102.0 + SETTLED_AFTER_S) == FIRST_DELAY_S
    policy.ready(1000.0)
    assert policy.lost(1001.0) == 2 * FIRST_DELAY_S


def test_ranks_that_do_not_start_again_are_given_up() -> None:
    policy = RestartPolicy()
    policy.ready(0.0)
    delays = [policy.lost(1.0) for _ in range(MAX_FAILED_STARTS + 1)]
    assert delays == [0.5, 1, 2, 4, 8, None]
    assert policy.num_failed_starts == MAX_FAILED_STARTS


def test_only_starts_that_fail_in_a_row_count() -> None:
    policy = RestartPolicy()
    for now_s in range(20):
        policy.ready(now_s)
        for _ in range(MAX_FAILED_STARTS):
            delay_s = policy.lost(now_s)
            assert delay_s is not None
            assert delay_s <= MAX_DELAY_S


# Hangs


def hung_after(watch: HangWatch, *, start_s: float, step_s: float = 0.05) -> float:
    """How long busy ranks are silent before they count as hung."""
    now_s = start_s
    while not watch.is_hung(now_s, busy=True):
        now_s += step_s
    return now_s - start_s


def test_busy_ranks_that_are_silent_for_too_long_hang() -> None:
    watch = HangWatch(10.0)
    assert not watch.is_hung(100.0, busy=False)
    assert 9.9 <= hung_after(watch, start_s=100.0) <= 10.1


def test_idle_ranks_may_be_silent_for_ever_and_the_time_does_not_count_later() -> None:
    watch = HangWatch(10.0)
    assert not any(watch.is_hung(now_s, busy=False) for now_s in range(1000))
    assert 9.9 <= hung_after(watch, start_s=1000.0) <= 10.1


def test_progress_of_a_long_step_starts_the_time_anew() -> None:
    watch = HangWatch(10.0)
    for second in range(100):
        assert not watch.is_hung(second, busy=True)
        if second % 9 == 0:
            watch.progress()
    watch.progress()
    assert 9.9 <= hung_after(watch, start_s=99.0) <= 10.1


def test_an_orchestrator_that_was_stopped_itself_blames_nobody() -> None:
    """The ranks may have reported all the time: the reports are yet to be read."""
    watch = HangWatch(10.0)
    assert not watch.is_hung(0.0, busy=True)
    assert not watch.is_hung(3600.0, busy=True)
    assert 10.0 - MAX_GAP_S - 0.1 <= hung_after(watch, start_s=3600.0) <= 10.1
