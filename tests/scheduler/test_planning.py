"""Batches and routes, as pure functions of values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.bisecting import is_suspect, plan_suspects
from scheduler.policy.fleet_view import FleetView
from scheduler.policy.pending import PendingRequests, ReadyRequest
from scheduler.policy.planning import (
    MIN_FETCHED_BLOCKS,
    BatchLimits,
    CachedPrefixes,
    PlannedBatch,
    Planner,
)
from scheduler.policy.prefix_affinity import PrefixAffinity
from support.ready_requests import BLOCK_SIZE, fleet, group, ready
from wire.ids import BlockHash, GroupId
from wire.messages import PrefixSource
from wire.scripts import CachedPrefix

LIMITS = BatchLimits(max_tokens=1000, max_requests=8, max_wait_s=0.0)


def planned(
    requests: list[ReadyRequest],
    view: FleetView,
    *,
    limits: BatchLimits = LIMITS,
    planner: Planner | None = None,
    now_s: float = 100.0,
) -> tuple[list[PlannedBatch], PendingRequests]:
    pending = PendingRequests()
    pending.give_back(requests)
    planner = planner or Planner(limits, BLOCK_SIZE)
    return planner.plan(pending, view, now_s), pending


def prompts(count: int, *prefix: int) -> list[ReadyRequest]:
    """Requests that share a prefix and nothing else, or nothing at all."""
    return [ready([*prefix, 100 + i, *range(7)]) for i in range(count)]


# Batches


def test_a_batch_ends_at_its_limit_of_requests() -> None:
    batches, pending = planned(prompts(10), fleet(group(credits=100)))
    assert [len(batch.requests) for batch in batches] == [8]
    assert len(pending) == 2


def test_a_batch_ends_at_its_limit_of_tokens() -> None:
    limits = BatchLimits(max_tokens=10, max_requests=8, max_wait_s=0.0)
    batches, pending = planned(
        [ready([1] * 4), ready([1] * 6), ready([1])], fleet(group()), limits=limits
    )
    assert [batch.num_tokens for batch in batches] == [10]
    assert len(pending) == 1


def test_journaled_tokens_count_as_they_are_prefilled_too() -> None:
    limits = BatchLimits(max_tokens=10, max_requests=8, max_wait_s=0.0)
    [batch], _ = planned([ready([1] * 4, num_journaled=6)], fleet(group()), limits=limits)
    assert batch.num_tokens == 10


def test_a_request_above_the_limit_goes_alone() -> None:
    limits = BatchLimits(max_tokens=10, max_requests=8, max_wait_s=0.0)
    [batch], pending = planned([ready([1] * 50), ready([1])], fleet(group()), limits=limits)
    assert batch.num_tokens == 50
    assert len(pending) == 1


def test_neighbours_in_a_batch_share_their_prefix() -> None:
    one, other = prompts(2, 1, 1, 1, 1), prompts(2, 2, 2, 2, 2)
    mixed = [one[0], other[0], one[1], other[1]]
    [batch], _ = planned(mixed, fleet(group()))
    firsts = [request.prompt_token_ids[0] for request in batch.requests]
    assert firsts in ([1, 1, 2, 2], [2, 2, 1, 1])


def test_few_requests_wait_for_company_but_not_for_long() -> None:
    limits = BatchLimits(max_tokens=1000, max_requests=8, max_wait_s=0.5)
    assert planned(prompts(2), fleet(group()), limits=limits, now_s=0.4)[0] == []
    [batch], _ = planned(prompts(2), fleet(group()), limits=limits, now_s=0.5)
    assert len(batch.requests) == 2


def test_a_full_batch_or_full_groups_do_not_wait() -> None:
    limits = BatchLimits(max_tokens=1000, max_requests=8, max_wait_s=0.5)
    [batch], _ = planned(prompts(8), fleet(group()), limits=limits, now_s=0.0)
    assert len(batch.requests) == 8
    [batch], _ = planned(prompts(2), fleet(group(credits=2)), limits=limits, now_s=0.0)
    assert len(batch.requests) == 2


# Routes


def test_nothing_goes_where_there_is_no_room() -> None:
    view = fleet(group("full", num_owned=8), group("leaving", draining=True))
    batches, pending = planned(prompts(3), view)
    assert batches == []
    assert len(pending) == 3


def test_load_spreads_over_the_groups() -> None:
    batches, _ = planned(prompts(12), fleet(group("g"), group("h"), group("i")))
    assert [len(batch.requests) for batch in batches] == [4, 4, 4]


def test_a_busy_group_gets_less() -> None:
    batches, _ = planned(prompts(4), fleet(group("busy", num_owned=4), group("idle")))
    assert Counter({b.group.group_id: len(b.requests) for b in batches}) == Counter(idle=4)


def test_equal_prefixes_go_to_one_group_and_the_rest_spreads() -> None:
    view = fleet(group("g", credits=50), group("h", credits=50))
    planner = Planner(BatchLimits(100_000, 50, 0.0), BLOCK_SIZE)
    long_prefix = list(range(8000))
    planned(prompts(1, *long_prefix), view, planner=planner)
    [home] = [g for g in view.groups.values() if g.num_owned]
    batches, _ = planned(prompts(3, *long_prefix), view, planner=planner)
    assert [batch.group for batch in batches] == [home]
    batches, _ = planned(prompts(4), view, planner=planner)
    assert all(batch.group is not home for batch in batches), "it is the busier one now"


def test_a_prefix_does_not_hold_requests_at_a_group_that_is_overloaded() -> None:
    view = fleet(group("g", credits=100), group("h", credits=100))
    planner = Planner(BatchLimits(10**6, 100, 0.0), BLOCK_SIZE)
    batches, _ = planned(prompts(100, *range(64)), view, planner=planner)
    sizes = [len(batch.requests) for batch in batches]
    assert len(sizes) == 2
    assert min(sizes) > 30


def test_what_a_dead_group_had_cached_is_forgotten() -> None:
    view = fleet(group("g", credits=50), group("h", credits=50))
    planner = Planner(LIMITS, BLOCK_SIZE)
    prefix = list(range(400))
    [first], _ = planned(prompts(1, *prefix), view, planner=planner)
    planner.forget_group(first.group.key)
    [second], _ = planned(prompts(1, *prefix), view, planner=planner)
    assert second.group is not first.group


def test_only_groups_of_the_model_are_asked() -> None:
    view = fleet(group("g", model="m"), group("h", model="other"))
    assert view.models == {"m", "other"}
    assert [g.group_id for g in view.serving("m").groups.values()] == ["g"]
    assert view.serving("m").groups["g:1"] is view.groups["g:1"]
    assert view.serving("neither").room == 0


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4),
    st.lists(st.integers(1, 40), max_size=40),
    st.integers(1, 10),
    st.integers(1, 60),
)
def test_credits_and_limits_hold_and_no_request_is_lost(
    rooms: list[tuple[int, int]], lengths: list[int], max_requests: int, max_tokens: int
) -> None:
    view = fleet(*(group(f"g{i}", credits=c, num_owned=o) for i, (c, o) in enumerate(rooms)))
    before = {key: g.room for key, g in view.groups.items()}
    requests = [ready([1] * length) for length in lengths]
    limits = BatchLimits(max_tokens, max_requests, 0.0)
    batches, pending = planned(requests, view, limits=limits)
    for batch in batches:
        assert 1 <= len(batch.requests) <= min(max_requests, before[batch.group.key])
        assert batch.num_tokens <= max_tokens or len(batch.requests) == 1
        assert batch.num_tokens == sum(r.num_prefill_tokens for r in batch.requests)
        assert batch.group.room == before[batch.group.key] - len(batch.requests)
    sent = [request.request_id for batch in batches for request in batch.requests]
    left = [request.request_id for request in pending.take(100)]
    assert sorted(sent + left) == sorted(request.request_id for request in requests)
    assert bool(sent) == bool(requests and sum(before.values()))


# Prefix affinity


def chain(*names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def test_affinity_finds_the_longest_common_prefix() -> None:
    affinity = PrefixAffinity()
    affinity.note("g", chain("a", "ab", "abc"), 0, 0.0)
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abx", "abxy"), 0, 0.0) == 2
    assert affinity.num_cached_blocks("g", chain("x"), 0, 0.0) == 0
    assert affinity.num_cached_blocks("g", [], 0, 0.0) == 0
    assert affinity.num_cached_blocks("h", chain("a"), 0, 0.0) == 0
    assert affinity.num_cached_blocks("h", chain("a"), 1, 0.0) == 1, "reported is reported"


def test_affinity_is_bounded_and_forgets_the_ends_of_old_chains_first() -> None:
    affinity = PrefixAffinity(max_blocks_per_group=4)
    affinity.note("g", chain("a", "ab", "abc"), 0, 0.0)
    affinity.note("g", chain("x", "xy"), 0, 0.0)
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abc"), 0, 0.0) == 2
    assert affinity.num_cached_blocks("g", chain("x", "xy"), 0, 0.0) == 2
    affinity.note("g", chain(*(str(i) for i in range(10))), 0, 0.0)
    assert affinity.num_cached_blocks("g", chain(*(str(i) for i in range(10))), 0, 0.0) == 4


def test_what_was_sent_counts_for_a_while() -> None:
    affinity = PrefixAffinity(lately_s=30.0)
    affinity.note("g", chain("a", "ab"), 0, 0.0)
    affinity.note("g", chain("a", "ax"), 0, 20.0)
    assert affinity.num_cached_blocks("g", chain("a", "ab"), 0, 30.0) == 2
    assert affinity.num_cached_blocks("g", chain("a", "ab"), 0, 31.0) == 1
    assert affinity.num_cached_blocks("g", chain("a", "ax"), 0, 51.0) == 0


def test_once_reported_the_reports_alone_count() -> None:
    affinity = PrefixAffinity()
    affinity.note("g", chain("a", "ab", "abc"), 0, 0.0)
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abc"), 2, 0.0) == 3
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abc"), 3, 0.0) == 3
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abc"), 1, 0.0) == 1, "evicted"
    affinity.note("g", chain("a", "ab", "abc"), 1, 0.0)
    assert affinity.num_cached_blocks("g", chain("a", "ab", "abc"), 1, 0.0) == 3, "sent again"


# Routes by what the directory says


PROMPT = list(range(8000))
ROOMY = BatchLimits(100_000, 50, 0.0)


def known(request: ReadyRequest, **num_blocks: int | tuple[int, int]) -> CachedPrefixes:
    """What groups have of a prompt: on the device, or on the device and in all."""
    pairs = {
        f"{name}:1": found if isinstance(found, tuple) else (found, found)
        for name, found in num_blocks.items()
    }
    return {request.request_id: {key: CachedPrefix(*pair) for key, pair in pairs.items()}}


def route(
    request: ReadyRequest, view: FleetView, cached: CachedPrefixes, planner: Planner | None = None
) -> PlannedBatch:
    pending = PendingRequests()
    pending.add(request)
    [batch] = (planner or Planner(ROOMY, BLOCK_SIZE)).plan(pending, view, 100.0, cached)
    return batch


def test_a_request_goes_where_the_directory_has_most_of_it() -> None:
    request = ready(PROMPT)
    view = fleet(group("g"), group("h"), group("i"))
    assert route(request, view, known(request, g=100, i=700)).group.group_id == "i"
    view = fleet(group("g"), group("h"), group("i", num_owned=5))
    assert route(request, view, known(request, g=100, i=110)).group.group_id == "g", "i is busy"


def test_a_prefix_on_the_device_is_worth_more_than_one_in_host_memory() -> None:
    request = ready(PROMPT)
    view = fleet(group("g"), group("h"), group("i"))
    cached = known(request, g=(0, 500), h=(500, 500), i=(100, 500))
    assert route(request, view, cached).group.group_id == "h"
    assert route(request, view, known(request, g=(0, 500), h=50)).group.group_id == "g"


def test_what_was_just_sent_counts_before_it_is_reported() -> None:
    view, planner = fleet(group("g"), group("h")), Planner(ROOMY, BLOCK_SIZE)
    first = route(ready(PROMPT), view, {}, planner)
    request = ready(PROMPT)
    assert route(request, view, known(request, g=3, h=3), planner).group is first.group


def test_the_directory_s_word_that_it_is_gone_counts_more_than_that_it_was_sent() -> None:
    view, planner = fleet(group("g"), group("h")), Planner(ROOMY, BLOCK_SIZE)
    request = ready(PROMPT)
    first = route(request, view, {}, planner).group
    reported = {first.group_id: 2000}
    planned([], view, planner=planner)
    request = ready(PROMPT)
    assert route(request, view, known(request, **reported), planner).group is first
    request = ready(PROMPT)
    assert route(request, view, {}, planner).group is not first, "it was evicted there"


def test_a_request_is_told_where_more_of_its_prompt_is_cached() -> None:
    request = ready(PROMPT)
    view = fleet(
        group("g", num_owned=8, transfer_address="tcp://g"),
        group("h"),
        group("i", num_owned=8),
    )
    cached = known(request, g=900, h=100, i=1000)
    batch = route(request, view, cached)
    assert batch.group.group_id == "h"
    assert batch.sources == {request.request_id: PrefixSource(GroupId("g"), 1, 900, "tcp://g")}


def test_a_few_blocks_more_are_not_worth_fetching() -> None:
    view = fleet(group("g", num_owned=8, transfer_address="tcp://g"), group("h"))
    request = ready(PROMPT)
    enough = known(request, g=100 + MIN_FETCHED_BLOCKS, h=100)
    assert route(request, view, enough).sources
    view.groups["h:1"].num_owned = 0
    request = ready(PROMPT)
    few = known(request, g=100 + MIN_FETCHED_BLOCKS - 1, h=100)
    assert not route(request, view, few).sources


def test_what_is_on_its_way_to_the_group_is_not_fetched_twice() -> None:
    view = fleet(group("g", num_owned=8, transfer_address="tcp://g"), group("h"))
    requests = [ready(PROMPT), ready(PROMPT)]
    pending = PendingRequests()
    pending.give_back(requests)
    cached = {**known(requests[0], g=2000), **known(requests[1], g=2000)}
    [batch] = Planner(ROOMY, BLOCK_SIZE).plan(pending, view, 100.0, cached)
    assert len(batch.requests) == 2
    assert list(batch.sources) == [requests[0].request_id]


def test_of_two_sources_the_longer_then_the_less_busy_one_is_named() -> None:
    request = ready(PROMPT)
    view = fleet(
        group("g", credits=4, num_owned=4, transfer_address="tcp://g"),
        group("h", credits=3, num_owned=3, transfer_address="tcp://h"),
        group("i", credits=2, num_owned=2, transfer_address="tcp://i"),
        group("j", num_owned=1),
    )
    sources = route(request, view, known(request, g=900, h=900, i=800)).sources
    assert sources[request.request_id].group_id == "h"


def test_only_what_is_about_to_go_is_asked_for() -> None:
    planner = Planner(BatchLimits(1000, 8, max_wait_s=0.5), BLOCK_SIZE)
    requests = [ready(at_s=float(i)) for i in range(30)]
    pending = PendingRequests()
    pending.give_back(reversed(requests))
    two = fleet(group("g", credits=5), group("h", credits=4))
    assert planner.next_up(pending, two, 100.0) == requests[:9]
    assert len(pending) == 30
    assert planner.next_up(pending, fleet(group("g")), 100.0) == [], "there is no choice"
    assert planner.next_up(PendingRequests(), two, 100.0) == []
    young = PendingRequests()
    young.add(ready(at_s=99.9))
    assert planner.next_up(young, two, 100.0) == [], "it waits for company"


# Suspects


def suspects(*requests: ReadyRequest) -> PendingRequests:
    pending = PendingRequests()
    pending.give_back(requests)
    return pending


def crashed(count: int, *, num_neighbours: int, num_crashes: int = 2) -> list[ReadyRequest]:
    return [
        replace(ready(), num_crashes=num_crashes, num_neighbours=num_neighbours)
        for _ in range(count)
    ]


def test_one_crash_makes_no_suspect() -> None:
    [once], [twice] = crashed(1, num_neighbours=3, num_crashes=1), crashed(1, num_neighbours=3)
    assert not is_suspect(once)
    assert is_suspect(twice)


def test_suspects_go_alone_and_half_as_many_at_a_time() -> None:
    waiting = suspects(*crashed(8, num_neighbours=7))
    batch = plan_suspects(waiting, fleet(group(num_owned=3), group("idle")), LIMITS)
    assert batch is not None
    assert batch.exclusive
    assert (batch.group.group_id, len(batch.requests), len(waiting)) == ("idle", 4, 4)


def test_the_smallest_half_counts_where_suspects_of_several_crashes_meet() -> None:
    waiting = suspects(*crashed(2, num_neighbours=7), *crashed(4, num_neighbours=1))
    batch = plan_suspects(waiting, fleet(group()), LIMITS)
    assert batch is not None
    assert len(batch.requests) == 2
    waiting = suspects(*crashed(4, num_neighbours=1), *crashed(2, num_neighbours=7))
    batch = plan_suspects(waiting, fleet(group()), LIMITS)
    assert batch is not None
    assert len(batch.requests) == 1


def test_a_group_is_emptied_for_suspects_when_none_is_idle() -> None:
    busy, less_busy = group("busy", num_owned=5), group("less", num_owned=2)
    batch = plan_suspects(suspects(*crashed(2, num_neighbours=3)), fleet(busy, less_busy), LIMITS)
    assert batch is not None
    assert batch.group is less_busy
    less_busy.exclusive = True
    assert less_busy.room == 0
    again = plan_suspects(suspects(*crashed(2, num_neighbours=3)), fleet(busy, less_busy), LIMITS)
    assert again is None, "it is being emptied already"
    view = fleet(busy, less_busy)
    again = plan_suspects(suspects(*crashed(2, num_neighbours=3)), view, LIMITS, ask_again=True)
    assert again is not None, "now and then it is asked again, or others would fill it"


def test_suspects_wait_for_a_group_that_can_be_trusted_to_answer() -> None:
    late = group()
    late.late = True
    waiting = suspects(*crashed(2, num_neighbours=3))
    assert plan_suspects(waiting, fleet(late, group("leaving", draining=True)), LIMITS) is None
    assert len(waiting) == 2


def test_a_group_that_missed_a_heartbeat_gets_nothing_new() -> None:
    late = group("late")
    late.late = True
    batches, _ = planned(prompts(4), fleet(late, group("well", num_owned=4)))
    assert [batch.group.group_id for batch in batches] == ["well"]
