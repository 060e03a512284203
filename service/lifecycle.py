"""How a process lives and ends: one shutdown path, taken on SIGTERM and SIGINT alike."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@asynccontextmanager
async def shutdown_signals() -> AsyncIterator[asyncio.Event]:
    """An event that is set by the first SIGTERM or SIGINT; a second one ends the process at once.

    The first signal asks for an orderly end (stop intake, drain, release, exit); whoever sends
    another one has run out of patience, and gets the exit status of a killed process.
    """
    stop = asyncio.Event()

    def on_signal(signal_number: int) -> None:
        if stop.is_set():
            os._exit(128 + signal_number)
        stop.set()

    loop = asyncio.get_running_loop()
    for signal_number in _SHUTDOWN_SIGNALS:
        loop.add_signal_handler(signal_number, on_signal, signal_number)
    try:
        yield stop
    finally:
        for signal_number in _SHUTDOWN_SIGNALS:
            loop.remove_signal_handler(signal_number)


async def unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """The result of `work`; None if `stop` was set first, when it is cancelled."""
    working = asyncio.create_task(work, name="work")
    stopping = asyncio.create_task(stop.wait(), name="wait-for-stop")
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
