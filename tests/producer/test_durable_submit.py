"""`submit(durable=True)`: on disk when it returns, or a clear error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forebay.broker_binary import BrokerBinary
from producer.aof import AofPolicy
from producer.durability import Durability
from producer.producer import Producer
from producer.sync import SyncProducer
from support.queue_driver import NAMESPACE, QueueDriver
from support.server_process import ServerProcess, restart_under
from wire.errors import ConfigError, ProducerClosed, ServerUnreachable
from wire.ids import RequestId


async def test_many_are_on_disk_after_one_wait_known_or_new(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.aof.SETTLING_S", 0.3)  # the test's server loses nothing
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        await producer.submit("x", request_id="0")
        async with asyncio.timeout(6):
            handles = await asyncio.gather(
                *(producer.submit("x", request_id=str(n), durable=True) for n in range(20))
            )
        assert [handle.request_id for handle in handles] == [str(n) for n in range(20)]
    assert len(await queue.queue()) == 20
    stats = await queue.client.info("commandstats")
    assert stats.get("cmdstat_waitaof", {"calls": 0})["calls"] < 30
    assert 0 < await queue.client.pttl(queue.keys.durable) <= 60_000


def test_the_synchronous_face_can_be_durable(own_server: ServerProcess) -> None:
    """With `appendfsync always` no server makes one wait."""
    own_server.command("CONFIG", "SET", "appendfsync", "always")
    with SyncProducer(own_server.url, namespace=NAMESPACE) as producer:
        producer.submit("x", request_id="a", durable=True)
    own_server.kill()
    own_server.restart()
    assert own_server.command("EXISTS", f"{{{NAMESPACE}:0}}:request:a")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("appendonly", "no", "appendonly yes"), ("appendfsync", "no", "appendfsync everysec")],
)
async def test_a_server_that_cannot_promise_gets_no_request(
    own_server: ServerProcess, own_queue: QueueDriver, setting: str, value: str, message: str
) -> None:
    own_server.command("CONFIG", "SET", setting, value)
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        with pytest.raises(ConfigError, match=message):
            await producer.submit("x", request_id="a", durable=True)
        assert await own_queue.state("a") is None
        await producer.submit("x", request_id="a")


async def test_without_leave_to_ask_it_takes_the_server_s_word_or_says_what_it_needs(
    own_server: ServerProcess, broker_binary: BrokerBinary
) -> None:
    """The user that `deploy/users.acl` makes: no CONFIG."""
    rights = ("~{test:*", "resetchannels", "+@all", "-@admin", "-@dangerous", "+info")
    own_server.command("ACL", "SETUSER", "forebay", "on", ">secret", *rights)
    url = own_server.url.replace("unix://", "unix://forebay:secret@")
    async with Producer(url, namespace=NAMESPACE) as producer:
        if broker_binary.product == "valkey" or broker_binary.version >= (7, 2, 0):
            await producer.submit("x", request_id="a", durable=True)
        else:
            with pytest.raises(ConfigError, match=r"config\|get"):
                await producer.submit("x", request_id="a", durable=True)


async def test_the_server_s_word_is_what_counts(
    own_server: ServerProcess, broker_binary: BrokerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It will not say that it is on disk where nothing is ever synced."""
    if broker_binary.version < (7, 2, 0):
        pytest.skip("this server has no WAITAOF")
    monkeypatch.setattr("producer.durability.WAIT_MS", 50)
    monkeypatch.setattr(AofPolicy, "of", lambda *_, has_waitaof: AofPolicy(has_waitaof, None))
    own_server.command("CONFIG", "SET", "appendfsync", "no")
    async with Producer(own_server.url, namespace=NAMESPACE, patience_s=0.2) as producer:
        with pytest.raises(ServerUnreachable, match="appendfsync"):
            await producer.submit("x", request_id="a", durable=True)
        own_server.command("CONFIG", "SET", "appendfsync", "always")
        await producer.submit("x", request_id="a", durable=True)


async def test_a_request_that_is_lost_before_it_is_on_disk_is_submitted_again(
    own_queue: QueueDriver, own_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_server.command("CONFIG", "SET", "appendfsync", "always")
    original = Durability.confirm
    num_crashes = 0

    async def crash_before(self: Durability, request_id: RequestId) -> bool:
        nonlocal num_crashes
        if not num_crashes:
            num_crashes += 1
            own_server.kill()
            own_server.truncate_aof(own_server.aof_size())
            await restart_under(own_queue.client, own_server)
            own_server.command("CONFIG", "SET", "appendfsync", "always")
        return await original(self, request_id)

    monkeypatch.setattr(Durability, "confirm", crash_before)
    async with Producer(own_server.url, namespace=NAMESPACE) as producer:
        await producer.submit("x", request_id="a", durable=True)
    assert await own_queue.queue() == ["a"]


async def test_a_server_that_cannot_say_in_time_is_an_error(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_yet(*_: Any) -> None:
        return None

    monkeypatch.setattr(Durability, "_try", not_yet)
    async with Producer(redis_url, namespace=NAMESPACE, patience_s=0.05) as producer:
        with pytest.raises(ServerUnreachable, match="is its disk slow or full"):
            await producer.submit("x", request_id="a", durable=True)
    assert await queue.state("a") == "queued"


async def test_closing_ends_the_wait_for_the_disk(
    queue: QueueDriver, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def for_ever(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Durability, "_try", for_ever)
    async with Producer(redis_url, namespace=NAMESPACE) as producer:
        waiting = asyncio.ensure_future(producer.submit("x", request_id="a", durable=True))
        while producer._queue.durability._rounds is None:
            await asyncio.sleep(0.01)
    with pytest.raises(ProducerClosed):
        await waiting
