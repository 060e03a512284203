"""`forebay dead-letters`: what is shown to whom, and what is asked before it is done."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from forebay.cli import main
from support.dead_requests import let_die
from support.queue_driver import NAMESPACE, open_queue
from wire.codec import encode
from wire.ids import RequestId
from wire.messages import ChatMessage, Prompt, Request

SECRET = "my diagnosis"
Run: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(redis_url: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on the test's server: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        where = ["--redis", redis_url, "--namespace", NAMESPACE]
        code = main(["dead-letters", arguments[0], *where, *arguments[1:]])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def dead_letters(redis_url: str) -> None:
    """Three: one that can be nothing but dropped, and two that were unlucky, the newest last."""

    async def make() -> None:
        async with open_queue(redis_url) as queue:
            await queue.submit("torn", message=b"junk")
            await let_die(queue, "torn", reason="wire_error", message="torn\x1b[31m message")
            for name in ("first", "second"):
                prompt = Prompt(messages=(ChatMessage("user", SECRET),))
                request = Request(RequestId(name), prompt, model="m")
                await queue.submit(name, message=encode(request))
                await let_die(queue, name)

    asyncio.run(make())


def queued(redis_url: str) -> list[str]:
    async def read() -> list[str]:
        async with open_queue(redis_url) as queue:
            return await queue.queue()

    return asyncio.run(read())


class Terminal(io.StringIO):
    """Somebody who types an answer."""

    def isatty(self) -> bool:
        return True


# list


def test_a_list_is_a_table_without_prompts(run: Run) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert lines[0] == ["REQUEST", "AGE", "REASON", "TRIES"]
    assert [line[0] for line in lines[1:]] == ["second", "first", "torn"]
    assert lines[1][2:] == ["worker_lost", "none"]
    assert re.fullmatch(r"\d+ s", lines[1][1])
    assert SECRET not in run("list", "--json")[1]


def test_a_list_for_programs(run: Run) -> None:
    letters = json.loads(run("list", "--json", "--reason", "wire_error")[1])
    assert [(letter["request_id"], letter["reason"]) for letter in letters] == [
        ("torn", "wire_error")
    ]


def test_a_list_that_is_cut_says_so(run: Run) -> None:
    code, out, err = run("list", "--limit", "2")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "more than these 2" in err


def test_an_empty_list(run: Run) -> None:
    assert run("list", "--reason", "luck") == (0, "no dead letters\n", "")
    assert run("list", "--reason", "luck", "--json")[1] == "[]\n"


def test_the_server_of_forebay_up_is_found_by_its_state_directory(
    redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = Path(redis_url.removeprefix("unix://")).parent
    arguments = ["--state-dir", str(state_dir), "--namespace", NAMESPACE]
    assert main(["dead-letters", "list", *arguments]) == 0
    assert "second" in capsys.readouterr().out


# show


def test_a_prompt_is_shown_only_when_asked_for(run: Run) -> None:
    code, out, _ = run("show", "second")
    assert code == 0
    assert "1 message; --prompt shows it" in out
    assert "model       m\n" in out
    for shown in (run("show", "second", "--json")[1], out):
        assert SECRET not in shown
    assert SECRET in run("show", "second", "--prompt")[1]
    letter = json.loads(run("show", "second", "--prompt", "--json")[1])
    assert letter["request"]["prompt"] == [{"role": "user", "content": SECRET}]


def test_what_cannot_be_decoded_is_shown_as_far_as_it_goes(run: Run) -> None:
    code, out, _ = run("show", "torn")
    assert code == 0
    assert "unreadable" in out
    assert "torn\\x1b[31m message" in out, "no terminal obeys it"
    assert json.loads(run("show", "torn", "--json")[1])["request"] is None


@pytest.mark.parametrize("command", [["show"], ["replay"], ["drop", "--yes"]])
def test_an_id_that_is_no_dead_letter_is_named(run: Run, command: list[str]) -> None:
    code, _, err = run(*command, "nobody")
    assert code == 1
    assert err.startswith("error: there is no dead letter 'nobody'")


# replay


def test_a_replay_says_what_it_became(run: Run, redis_url: str) -> None:
    assert run("replay", "first") == (0, "first -> first.replay-1\n", "")
    assert queued(redis_url) == ["first.replay-1"]


def test_all_that_can_be_replayed_are(run: Run, redis_url: str) -> None:
    code, out, err = run("replay", "--all", "--json")
    assert json.loads(out) == {"replayed": {n: f"{n}.replay-1" for n in ("second", "first")}}
    assert code == 1
    assert "'torn' cannot be replayed" in err
    assert queued(redis_url) == ["second.replay-1", "first.replay-1"]


def test_a_full_queue_ends_a_replay_of_all(run: Run) -> None:
    code, out, err = run("replay", "--all", "--reason", "worker_lost", "--max-queued", "1")
    assert (code, out) == (1, "second -> second.replay-1\n")
    assert "'first' cannot be replayed now" in err


# drop


def test_nothing_is_dropped_where_nobody_can_be_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, err = run("drop", "--all")
    assert (code, out) == (2, "")
    assert "give --yes" in err


@pytest.mark.parametrize(
    ("answer", "code", "num_left"), [("n\n", 130, 3), ("\n", 130, 3), ("y\n", 0, 1)]
)
def test_a_drop_is_asked_about(
    run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, num_left: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended, _, err = run("drop", "--all", "--reason", "worker_lost")
    assert ended == code
    assert "Delete 2 dead letters?" in err
    assert len(json.loads(run("list", "--json")[1])) == num_left


def test_a_drop_for_programs(run: Run) -> None:
    code, out, _ = run("drop", "first", "torn", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"dropped": ["first", "torn"]})


@pytest.mark.parametrize("command", ["replay", "drop"])
@pytest.mark.parametrize(
    "selection", [[], ["first", "--all"], ["first", "--reason", "worker_lost"]]
)
def test_what_is_meant_must_be_clear(run: Run, command: str, selection: list[str]) -> None:
    code, out, err = run(command, *selection)
    assert (code, out) == (2, "")
    assert "--all" in err
