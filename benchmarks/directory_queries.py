"""Longest prefixes: one call to the directory, against a hash per block.

The peer keeps a hash for each block, with a field for each group that holds it, and asks for a
prompt with a pipeline of HKEYS, one per block; the lengths come out on the client, by following
each group from the first block on. It runs on the same server, over the same client. As most of
its time is the client's parsing, it is measured once more with nothing parsed: the bytes of the
same pipeline over a bare socket, until all of the reply is in.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.directory_fleet import Bench, Traffic, random_hashes
from wire.ids import BlockHash

NUM_BLOCKS_IN_BATCH = 64


async def measure_queries(
    bench: Bench, *, num_groups: int, num_blocks: int, num_rounds: int
) -> list[dict[str, Any]]:
    """One prompt, of which all groups, a tenth of them, or none hold some part."""
    names = [f"group-{index}" for index in range(num_groups)]
    reports = []
    for num_holders in (num_groups, num_groups // 10, 0):
        await bench.client.flushdb()
        epochs = {name: await bench.join(name) for name in names}
        chain = random_hashes(num_blocks)
        lengths = _lengths(names[:num_holders], num_blocks)
        for name, length in lengths.items():
            await bench.fill(name, epochs[name], chain[:length])
        keys = {f"{name}:{epochs[name]}": length for name, length in lengths.items()}
        await _fill_peer(bench, chain, keys)
        reports.append(await _compare(bench, chain, keys, num_rounds))
    return reports


async def measure_batch(bench: Bench, *, num_groups: int, num_prompts: int) -> dict[str, Any]:
    """A planned batch of prompts whose beginnings all groups hold: the most looks there can be."""
    await bench.client.flushdb()
    chains = [random_hashes(NUM_BLOCKS_IN_BATCH) for _ in range(num_prompts)]
    for index in range(num_groups):
        name = f"group-{index}"
        epoch = await bench.join(name)
        await bench.fill(name, epoch, [one for chain in chains for one in chain[:40]])
    packed = [b"".join(chain) for chain in chains]
    _, before_us = await bench.script_us()
    times = [await _time(lambda: bench.scripts.directory_query(packed)) for _ in range(5)]
    _, after_us = await bench.script_us()
    return {
        "num_prompts": num_prompts,
        "num_blocks": NUM_BLOCKS_IN_BATCH,
        "num_groups": num_groups,
        "client_ms": round(1000 * statistics.median(times), 2),
        "server_ms": round((after_us - before_us) / 5000, 2),
    }


def _lengths(names: Sequence[str], num_blocks: int) -> dict[str, int]:
    """How much each holder has: anything from one block to all, the same for each run."""
    rng = random.Random(5)
    return {name: rng.randint(1, num_blocks) for name in names}


async def _compare(
    bench: Bench, chain: list[BlockHash], lengths: dict[str, int], num_rounds: int
) -> dict[str, Any]:
    async def ours() -> dict[str, int]:
        [answer] = await bench.scripts.directory_query([b"".join(chain)])
        return {key: found.num_blocks for key, found in answer.items()}

    async def peer() -> dict[str, int]:
        pipeline = bench.client.pipeline(transaction=False)
        for block in chain:
            pipeline.hkeys(_peer_key(block))
        return _follow(await pipeline.execute())

    assert await ours() == lengths
    assert await peer() == lengths
    our_bytes, peer_bytes = await _bytes(bench, ours), await _bytes(bench, peer)
    _, before_us = await bench.script_us()
    our_s, peer_s, bare_s = [], [], []
    for _ in range(num_rounds):
        our_s.append(await _time(ours))
        peer_s.append(await _time(peer))
        bare_s.append(await _bare_socket_s(bench, chain, peer_bytes.num_sent))
    _, after_us = await bench.script_us()
    ms = [1000 * statistics.median(times) for times in (our_s, peer_s, bare_s)]
    totals = [traffic.num_received + traffic.num_sent for traffic in (our_bytes, peer_bytes)]
    return {
        "num_blocks": len(chain),
        "num_holders": len(lengths),
        "mean_holders_per_block": round(sum(lengths.values()) / len(chain), 1),
        "bytes": totals[0],
        "peer_bytes": totals[1],
        "times_fewer_bytes": round(totals[1] / totals[0], 1),
        "ms": round(ms[0], 3),
        "server_ms": round((after_us - before_us) / num_rounds / 1000, 3),
        "peer_ms": round(ms[1], 3),
        "times_less_time": round(ms[1] / ms[0], 1),
        "peer_without_parsing_ms": round(ms[2], 3),
        "times_less_than_without_parsing": round(ms[2] / ms[0], 1),
    }


def _peer_key(block: BlockHash) -> bytes:
    return b"block:" + block


async def _fill_peer(bench: Bench, chain: list[BlockHash], lengths: dict[str, int]) -> None:
    for first in range(0, len(chain), 500):
        pipeline = bench.client.pipeline(transaction=False)
        for place in range(first, min(first + 500, len(chain))):
            for key, length in lengths.items():
                if length > place:
                    pipeline.hset(_peer_key(chain[place]), key, "device")
        await pipeline.execute()


def _follow(holders: Sequence[Sequence[bytes]]) -> dict[str, int]:
    """How far each group goes, from the holders of each block."""
    lengths: dict[bytes, int] = {}
    going_on = set(holders[0])
    for place, names in enumerate(holders):
        going_on.intersection_update(names)
        if not going_on:
            break
        for name in going_on:
            lengths[name] = place + 1
    return {name.decode(): length for name, length in lengths.items()}


async def _bytes(bench: Bench, call: Callable[[], Awaitable[Any]]) -> Traffic:
    reading, before = await bench.reading(), await bench.traffic()
    await call()
    after = await bench.traffic()
    return Traffic(
        after.num_received - before.num_received - reading.num_received,
        after.num_sent - before.num_sent - reading.num_sent,
    )


async def _time(call: Callable[[], Awaitable[Any]]) -> float:
    started_s = time.perf_counter()
    await call()
    return time.perf_counter() - started_s


async def _bare_socket_s(bench: Bench, chain: list[BlockHash], num_reply_bytes: int) -> float:
    command = b"*2\r\n$5\r\nHKEYS\r\n$22\r\n%b\r\n"
    request = b"".join(command % _peer_key(block) for block in chain)
    reader, writer = await asyncio.open_unix_connection(bench.url.removeprefix("unix://"))
    try:
        started_s = time.perf_counter()
        writer.write(request)
        while num_reply_bytes > 0:
            num_reply_bytes -= len(await reader.read(1 << 20))
        return time.perf_counter() - started_s
    finally:
        writer.close()
        await writer.wait_closed()
