"""What must hold after every run, whatever was struck in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

from redis.asyncio import Redis

from crash_points.job import Task
from crash_points.programs import Books, Run
from crash_points.ranks import Regenerated
from wire.keys import DISPATCHERS, Keys
from wire.records import RESULT_FIELDS, JournalEntry, journal_entry, result_from_record


@dataclass(slots=True)
class Findings:
    """What was found wrong; and whether a group was taken for dead that was only slow."""

    problems: list[str] = field(default_factory=list)
    regenerated: Regenerated = field(default_factory=Regenerated)
    had_false_alarm: bool = False


async def check_run(
    run: Run, client: Redis, *, num_worker_deaths: int, num_rejoins: int
) -> Findings:
    """Compare what users have, what the server holds, and what the engine did, with the job.

    `num_rejoins`: how often a worker has joined the fleet again although it had not died.
    """
    findings = Findings()
    problems = findings.problems
    keys = Keys(run.namespace)
    _check_books(run.books, problems)
    await _check_records(run.books, client, keys, problems)
    await _check_leftovers(run.books, client, keys, problems)
    _check_attempts(run, findings, num_worker_deaths, num_rejoins)
    return findings


def _check_books(books: Books, problems: list[str]) -> None:
    """Users have every result, right and (but for repeated deliveries) once; streams are whole."""
    shares = books.shares
    expected = {
        "consumed": (books.consumed, [*shares.single, *shares.bulk]),
        "produced": (books.produced, [*shares.bulk, *shares.own]),
    }
    for name, (book, tasks) in expected.items():
        if unexpected := book.keys() - {task.request_id for task in tasks}:
            problems.append(f"{name}: results of {sorted(unexpected)} went to the wrong place")
        for task in tasks:
            results = book.get(task.request_id, [])
            if not results:
                problems.append(f"{name}: no result of {task.request_id}")
            differences = {task.answer.difference(result) for result in results}
            problems += [f"{name}: {task.request_id} {d}" for d in differences if d is not None]
            if len({(result.submitted_ms, result.finished_ms) for result in results}) > 1:
                problems.append(f"{name}: {task.request_id} ended more than once")
    for task in books.job:
        if task.request.stream:
            _check_stream(task, books, problems)


def _check_stream(task: Task, books: Books, problems: list[str]) -> None:
    chunks = books.chunks[task.request_id]
    num_tokens = num_chars = 0
    for chunk in chunks:
        if (chunk.offset, chunk.text_offset) != (num_tokens, num_chars):
            problems.append(
                f"stream of {task.request_id}: a chunk at {chunk.offset} tokens and "
                f"{chunk.text_offset} characters behind {num_tokens} and {num_chars}"
            )
            return
        num_tokens += len(chunk.token_ids)
        num_chars += len(chunk.text)
    tokens = tuple(token_id for chunk in chunks for token_id in chunk.token_ids)
    text = "".join(chunk.text for chunk in chunks)
    if (tokens, text) != (task.answer.token_ids, task.answer.text):
        problems.append(f"stream of {task.request_id}: {text!r} in place of {task.answer.text!r}")


async def _check_records(books: Books, client: Redis, keys: Keys, problems: list[str]) -> None:
    """The server holds one right result each, and journals that are whole and end once."""
    async with client.pipeline(transaction=False) as pipe:
        for task in books.job:
            pipe.hmget(keys.request(task.request_id), *RESULT_FIELDS)
            pipe.xrange(keys.journal(task.request_id))
        replies = await pipe.execute()
    for task, record, journal in zip(books.job, replies[::2], replies[1::2], strict=True):
        result = result_from_record(task.request_id, record)
        if result is None:
            problems.append(f"record: {task.request_id} has not ended: {record[0]!r}")
        elif difference := task.answer.difference(result):
            problems.append(f"record: {task.request_id} {difference}")
        _check_journal(task, [journal_entry(*entry) for entry in journal], problems)


def _check_journal(task: Task, journal: Sequence[JournalEntry], problems: list[str]) -> None:
    if [entry.state for entry in journal if entry.state] != ["done"]:
        problems.append(f"journal of {task.request_id}: it does not end once: {journal}")
    if not task.request.stream:
        return  # it is emptied at the end
    tokens = [t for entry in journal if entry.chunk for t in entry.chunk.token_ids]
    text = "".join(entry.chunk.text for entry in journal if entry.chunk)
    if (tuple(tokens), text) != (task.answer.token_ids, task.answer.text):
        problems.append(f"journal of {task.request_id}: {text!r}, not {task.answer.text!r}")


async def _check_leftovers(books: Books, client: Redis, keys: Keys, problems: list[str]) -> None:
    """One end was told for each request; nothing is queued, held, delayed, dead, or immortal."""
    names = sorted(key.decode() for key in cast("list[bytes]", await client.keys()))
    results = [name for name in names if name.startswith(f"{keys.prefix}:results:")]
    held = [name for name in names if name.endswith(":owned")]
    intakes = [name for name in names if name in keys.intakes.values()]
    async with client.pipeline(transaction=False) as pipe:
        for stream in (*results, *intakes):
            pipe.xinfo_stream(stream)
        for name in intakes:
            pipe.xpending(name, DISPATCHERS)
        for name in names:
            pipe.pttl(name)
        replies = iter(await pipe.execute())
    num_told = sum(next(replies)["entries-added"] for _ in results)
    if num_told != len(books.job):
        problems.append(f"{num_told} ends were told, of {len(books.job)} requests")
    problems += [f"{name} is not empty" for name in intakes if next(replies)["length"]]
    problems += [f"{name} has unread mail" for name in intakes if next(replies)["pending"]]
    problems += [f"{name} lives for ever" for name in names if next(replies) == -1]
    # An empty set is no key.
    problems += [f"{name} is not empty" for name in held]
    problems += [f"{name} exists" for name in (keys.delayed, keys.dead_letters) if name in names]


def _check_attempts(run: Run, findings: Findings, num_worker_deaths: int, num_rejoins: int) -> None:
    """No token was computed twice, but for at most a block of each request when a group died."""
    num_attempts = max(map(len, run.attempts.values()), default=0)
    if num_attempts > 1 + num_worker_deaths + num_rejoins:
        findings.problems.append(
            f"a request was begun {num_attempts} times, but {num_worker_deaths} groups died"
        )
    # On a busy machine, a group that is slow may be declared dead: it loses what it computes until
    # it hears of it. No promise covers that, so there is nothing to compare with.
    findings.had_false_alarm = num_attempts > 1 + num_worker_deaths
    if findings.had_false_alarm:
        return
    for request_id, attempts in run.attempts.items():
        for attempt, following in pairwise(attempts):
            num_lost = attempt.offset + attempt.num_tokens - following.offset
            findings.regenerated.note(num_lost, stream=attempt.stream)
            if not 0 <= num_lost <= attempt.at_most_lost:
                findings.problems.append(
                    f"{request_id}: {num_lost} tokens were generated again, "
                    f"at most {attempt.at_most_lost} may be"
                )
