"""The rank processes of one worker group: started together, watched, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator

import structlog

from gpu_worker.rank_options import RankOptions, rank_command
from gpu_worker.rank_protocol import FromRank, RankConnection, RankError, RankReady, Stop, ToRank
from service.folders import temporary_folder
from service.settings import variable
from wire.errors import ConfigError, ForebayError, ModelError, WireError

log = structlog.get_logger(__name__)

STOP_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 1.0
LAST_WORDS_S = 1.0
NEIGHBOURS_EXIT_S = 0.1
SPIN_COUNT = 10_000

_OPERATORS_ERRORS = {error.code: error for error in (ModelError, ConfigError)}
"""What a rank may report that starting it again cannot mend."""


class RankLost(ForebayError):
    """A rank exited, hung or sent nonsense; the others are of no use without it."""

    code = "worker_lost"


class RankGroup:
    """All ranks of a group, and the connection to rank 0."""

    def __init__(
        self, processes: list[asyncio.subprocess.Process], connection: RankConnection
    ) -> None:
        self._processes = processes
        self._connection = connection
        self._first_exit: str | None = None
        self._ready = False
        self._killed = False
        self._watchers = [
            asyncio.create_task(self._watch(rank), name=f"watch_rank_{rank}")
            for rank in range(1, len(processes))
        ]

    async def wait_ready(self, timeout_s: float) -> RankReady:
        """Wait until all ranks have loaded the model.

        Raises ModelError or ConfigError as rank 0 reports it, RankLost when a rank dies or takes
        too long.
        """
        try:
            async with asyncio.timeout(timeout_s):
                first = await self.receive()
        except TimeoutError as error:
            raise RankLost(
                f"the ranks did not load the model within {timeout_s:g} s; raise "
                "FOREBAY_LOAD_TIMEOUT_S if it is that large"
            ) from error
        if not isinstance(first, RankReady):
            raise RankLost(f"rank 0 began with {type(first).__name__} instead of RankReady")
        self._ready = True
        return first

    async def receive(self) -> FromRank:
        """The next frame from rank 0. Raises RankLost, or what rank 0 reports."""
        try:
            frame = await self._connection.receive()
        except WireError as error:
            raise RankLost(f"rank 0 sent what is no frame: {error}") from error
        if frame is None:
            raise await self._loss()
        if isinstance(frame, RankError):
            raise await self._reported(frame)
        return frame

    async def send(self, frame: ToRank) -> None:
        """Send to rank 0; nothing happens once the ranks were killed. Raises RankLost."""
        if self._killed:
            return
        try:
            await self._connection.send(frame)
        except ConnectionError as error:
            raise await self._loss() from error

    def kill(self) -> None:
        """End all ranks at once, those that hang or are stopped as well; `close` waits for it."""
        self._killed = True
        for watcher in self._watchers:
            watcher.cancel()
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def close(self) -> None:
        """End all ranks, by force those that do not stop by themselves; leave none behind."""
        for watcher in self._watchers:
            watcher.cancel()
        # A rank that still loads reads no frame, and has nothing to lose; one that is gone leaves
        # the others waiting for it in a collective.
        all_running = all(process.returncode is None for process in self._processes)
        if self._ready and all_running and not self._killed:
            await self._stop()
        self.kill()
        for process in self._processes:
            await process.wait()
        await self._connection.close()

    async def _stop(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT_S):  # a rank that hangs reads nothing
                await self._connection.send(Stop())
        exits = [asyncio.create_task(process.wait()) for process in self._processes]
        _, late = await asyncio.wait(exits, timeout=STOP_TIMEOUT_S)
        for rank, process in enumerate(self._processes):
            if process.returncode is None:
                log.warning("rank killed", rank=rank, pid=process.pid)
        for task in late:
            task.cancel()

    async def _watch(self, rank: int) -> None:
        """Wake whoever waits for rank 0 when another rank is gone: it would wait forever."""
        first_exit = await self._exit_of(rank)
        if not self._ready:
            # What keeps one from loading keeps all, and rank 0 can say what it is: let it.
            await asyncio.sleep(LAST_WORDS_S)
        self._first_exit = first_exit
        await self._connection.close()

    async def _loss(self) -> RankLost:
        """Why the connection to rank 0 is closed."""
        return RankLost(self._first_exit or await self._exit_of(0))

    async def _reported(self, frame: RankError) -> ForebayError:
        if frame.code in _OPERATORS_ERRORS:
            return _OPERATORS_ERRORS[frame.code](frame.message)
        reason = f"rank 0 failed: {frame.message}"
        if self._watchers:
            # Where another rank died first, all that rank 0 knows is that a collective failed.
            await asyncio.wait(self._watchers, timeout=NEIGHBOURS_EXIT_S)
            reason = "; ".join(part for part in (self._first_exit, reason) if part)
        return RankLost(reason)

    async def _exit_of(self, rank: int) -> str:
        """Wait for a rank's end and say what it was."""
        process = self._processes[rank]
        try:
            async with asyncio.timeout(None if rank else EXIT_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            return f"rank {rank} (pid {process.pid}) closed its connection and hangs"
        if code < 0:
            return f"rank {rank} (pid {process.pid}) was killed by {signal.Signals(-code).name}"
        return f"rank {rank} (pid {process.pid}) exited with status {code}"


@contextlib.asynccontextmanager
async def open_ranks(options: RankOptions, size: int) -> AsyncIterator[RankGroup]:
    """Start `size` ranks; end them at the end: in an orderly way, or after an error at once.

    Raises RankLost when they cannot be started.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            group = await _start(options, size, stack)
        except OSError as error:  # no memory, no processes, no room for temporary files
            raise RankLost(f"the ranks cannot be started: {error}") from error
        try:
            yield group
        except BaseException:
            group.kill()
            raise
        finally:
            await group.close()


async def _start(options: RankOptions, size: int, stack: contextlib.AsyncExitStack) -> RankGroup:
    """Start the ranks; `stack` cleans up what is left of them, started or half started."""
    # Private: whoever can write the rendezvous file can join the group.
    folder = stack.enter_context(temporary_folder("forebay-ranks-"))
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    processes: list[asyncio.subprocess.Process] = []
    stack.push_async_callback(_end_all, processes)
    with theirs:
        for rank in range(size):
            inherited = theirs.fileno() if rank == 0 else None
            command = rank_command(
                options,
                rank=rank,
                size=size,
                rendezvous=str(folder / "rendezvous"),
                socket_fd=inherited,
            )
            processes.append(
                await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    env=_rank_environment(options),
                    pass_fds=() if inherited is None else (inherited,),
                )
            )
    return RankGroup(processes, await RankConnection.open(ours))


async def _end_all(processes: list[asyncio.subprocess.Process]) -> None:
    """End processes that no RankGroup has ended: where not even all could be started."""
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _rank_environment(options: RankOptions) -> dict[str, str]:
    """Ours, with the bound of the CPU kernels, and torch's threads told to spin only shortly.

    On an idle machine spinning is faster than sleeping; on a busy one it takes the core away from
    the very thread that is waited for (docs/LOG.md has the figures). It must be set before torch is
    loaded; what the user has set stays.
    """
    environment = {**os.environ, variable("cpu_isa"): options.cpu_isa}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return environment
