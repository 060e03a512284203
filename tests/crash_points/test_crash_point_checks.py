"""The harness itself: its checks find nothing in a job that went well, and notice what did not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from redis.asyncio import Redis

from crash_points.checks import check_run
from crash_points.job import BLOCK_SIZE
from crash_points.points import Scenario
from crash_points.programs import Run, services_in_process
from crash_points.ranks import Attempt, Life
from crash_points.running import run_job
from support.fault_injection import faulty_connections
from wire.client import connect
from wire.ids import RequestId
from wire.keys import Keys

STREAM, OTHER_STREAM = RequestId("request-5"), RequestId("request-13")
OTHER, YET_ANOTHER = RequestId("request-2"), RequestId("request-4")


@dataclass
class Finished:
    """A job that went well."""

    run: Run
    client: Redis
    keys: Keys

    async def problems(self) -> list[str]:
        found = await check_run(self.run, self.client, num_worker_deaths=1, num_rejoins=0)
        return found.problems


async def lose_a_chunk(job: Finished) -> None:
    del job.run.books.chunks[STREAM][0]


async def repeat_a_chunk(job: Finished) -> None:
    chunks = job.run.books.chunks[OTHER_STREAM]
    chunks.insert(1, chunks[0])


async def lose_a_result(job: Finished) -> None:
    del job.run.books.consumed[YET_ANOTHER]


async def answer_wrongly(job: Finished) -> None:
    [result] = job.run.books.consumed[OTHER]
    job.run.books.consumed[OTHER] = [replace(result, text=result.text + "!")]


async def end_twice(job: Finished) -> None:
    await job.client.xadd(job.keys.journal(OTHER), {"state": "done"})


async def tell_twice(job: Finished) -> None:
    await job.client.xadd(job.keys.results("shared"), {"request_id": OTHER, "state": "done"})


async def lose_a_record(job: Finished) -> None:
    await job.client.delete(job.keys.request(YET_ANOTHER))


async def leave_one_queued(job: Finished) -> None:
    await job.client.xadd(job.keys.intakes["standard"], {"request_id": OTHER})


async def leave_one_assigned(job: Finished) -> None:
    key = f"{job.keys.prefix}:group:g:1:owned"
    await job.client.sadd(key, OTHER)
    await job.client.pexpire(key, 9000)


async def forget_a_time_to_live(job: Finished) -> None:
    await job.client.persist(job.keys.journal(OTHER))


async def compute_two_blocks_again(job: Finished) -> None:
    """As if the group had died when two blocks of this one's tokens were not written yet."""
    attempts = job.run.attempts[OTHER]
    attempts.insert(0, Attempt(Life(), stream=False, offset=0, num_tokens=2 * BLOCK_SIZE))


async def begin_without_a_reason(job: Finished) -> None:
    job.run.attempts[YET_ANOTHER] *= 3


TAMPERINGS: tuple[Callable[[Finished], Awaitable[None]], ...] = (
    lose_a_chunk,
    repeat_a_chunk,
    lose_a_result,
    answer_wrongly,
    end_twice,
    tell_twice,
    lose_a_record,
    leave_one_queued,
    leave_one_assigned,
    forget_a_time_to_live,
    compute_two_blocks_again,
    begin_without_a_reason,
)


async def test_each_thing_that_goes_wrong_is_noticed(redis_url: str) -> None:
    with faulty_connections(), services_in_process():
        run, _, problem = await run_job(Scenario(), f"{redis_url}?db=0")
    assert problem is None
    async with connect(redis_url) as client:
        job = Finished(run, client, Keys(run.namespace))
        noticed = await job.problems()
        assert noticed == []
        for tamper in TAMPERINGS:
            await tamper(job)
            now_noticed = await job.problems()
            assert set(now_noticed) - set(noticed), f"{tamper.__name__} went unnoticed"
            noticed = now_noticed
        await client.flushdb()
