"""A producer that answers by itself, and a progress that remembers, for tests of batch runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.batch import RowFailure
from wire.ids import token_ids
from wire.messages import Request, Result

Answer = Callable[[Request], Result]


def answer(request: Request) -> Result:
    """A result of three tokens for a prompt of five."""
    return Result(
        request_id=request.request_id,
        state="done",
        model="fake",
        text="an answer",
        token_ids=token_ids((1, 2, 3)),
        finish_reason="stop",
        num_prompt_tokens=5,
        num_cached_tokens=4,
        submitted_ms=1_700_000_000_123,
        finished_ms=1_700_000_001_000,
    )


@dataclass
class FakeProducer:
    """Holds up to `max_in_flight` requests, and answers the newest first."""

    answer: Answer = answer
    seen: list[Request] = field(default_factory=list)
    remember: bool = True
    most_in_flight: int = 0

    async def submit_many(
        self,
        requests: AsyncIterable[Request] | Iterable[Request],
        *,
        max_in_flight: int = 256,
        forget: bool = False,
        adopt: bool = False,
    ) -> AsyncIterator[Result]:
        """Yield a result for each request."""
        assert isinstance(requests, AsyncIterable)
        assert forget, "a run's results must not pile up on the server"
        assert adopt, "nor those of the run before"
        waiting: list[Request] = []
        async for request in requests:
            if self.remember:
                self.seen.append(request)
            waiting.append(request)
            self.most_in_flight = max(self.most_in_flight, len(waiting))
            if len(waiting) == max_in_flight:
                yield self.answer(waiting.pop())
        while waiting:
            yield self.answer(waiting.pop())


@dataclass
class FakeProgress:
    """Remembers what it was told."""

    reads: list[tuple[int, int | None]] = field(default_factory=list)
    done: tuple[int, int, int, int] = (0, 0, 0, 0)
    failures: list[RowFailure] = field(default_factory=list)
    resumed: tuple[int, int] = (0, 0)
    notices: list[str] = field(default_factory=list)

    def on_resumed(self, num_answered: int, num_failed: int) -> None:
        """Remember it."""
        self.resumed = (num_answered, num_failed)

    def on_notice(self, line: str) -> None:
        """Remember it."""
        self.notices.append(line)

    def on_read(self, num_rows: int, estimated_rows: int | None) -> None:
        """Remember it."""
        self.reads.append((num_rows, estimated_rows))

    def on_done(
        self, num_succeeded: int, num_failed: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Remember the last one."""
        self.done = (num_succeeded, num_failed, num_prompt_tokens, num_output_tokens)

    def on_failure(self, failure: RowFailure) -> None:
        """Remember it."""
        self.failures.append(failure)


def chat_row(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    """A good chat row, with `body` on top of its messages."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "Hello"}], **body},
    }


def text_row(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    """A good completions row, with `body` on top of its prompt."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "Once", **body},
    }


def line(row: object) -> bytes:
    """`row` as one line of JSON, without its break."""
    return json.dumps(row).encode()


def write_rows(path: Path, rows: Iterable[object]) -> str:
    """Write a JSONL file; its path. Bytes are written as they are."""
    lines = (row if isinstance(row, bytes) else line(row) for row in rows)
    path.write_bytes(b"".join(each + b"\n" for each in lines))
    return str(path)


def custom_ids(path: Path) -> list[str]:
    """The custom_ids of a JSONL file's rows."""
    return [row["custom_id"] for row in read_rows(path)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each of which has to be whole."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(each) for each in content.splitlines()]
