"""Keeping a process running: whenever it dies or ends with an error, the next life begins.

    life 1 ── killed, or the server was not reachable ──▶ life 2 ── ... ──▶ the program is done

A killed process leaves behind what its cleaning up does without a server: nobody waits for that
before the next life begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from support.fault_injection import Fault, FaultyProcess
from wire.errors import ServerUnreachable

RESTART_S = 0.02
MAX_LIVES = 20


class Role:
    """One role of a run. `faults` are those of its first life, its second life, and so on.

    `url` names the server, and has options already. `on_death` is called with the number of the
    life that has just ended.
    """

    def __init__(
        self,
        name: str,
        program: Callable[[str, FaultyProcess], Coroutine[Any, Any, None]],
        *,
        url: str,
        prefix: str,
        faults: Sequence[Sequence[Fault]],
        on_death: Callable[[int], None],
    ) -> None:
        self.name = name
        self.lives: list[FaultyProcess] = []
        self.is_done = False
        self._program = program
        self._url = url
        self._prefix = prefix
        self._faults = faults
        self._on_death = on_death
        self._bodies: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Live until the program is done. Raises what a life raises that is not its death."""
        try:
            while not self.is_done:
                assert len(self.lives) < MAX_LIVES, f"{self.name} does not stay alive"
                self.is_done = await self._live()
        finally:
            for body in self._bodies:
                body.cancel()
            await asyncio.gather(*self._bodies, return_exceptions=True)

    def kill(self) -> None:
        """Kill the life that it has now."""
        if self.lives:
            self.lives[-1].die()

    async def _live(self) -> bool:
        """Returns whether the program came to its end."""
        number = len(self.lives) + 1
        died = asyncio.Event()
        process = FaultyProcess(
            f"{self._prefix}-{self.name}-{number}",
            self._faults[number - 1] if number <= len(self._faults) else (),
            on_death=died.set,
        )
        self.lives.append(process)
        body = asyncio.create_task(
            self._program(f"{self._url}&client_name={process.name}", process), name=process.name
        )
        self._bodies.append(body)
        dying = asyncio.create_task(died.wait())
        try:
            await asyncio.wait((body, dying), return_when=asyncio.FIRST_COMPLETED)
        finally:
            dying.cancel()
        if process.is_dead:
            body.cancel()
            self._on_death(number)
            return False
        try:
            await body
        except ServerUnreachable:  # it ends with an error, and whoever runs it starts it again
            await asyncio.sleep(RESTART_S)
            return False
        return True
