"""The rank processes of one worker group: started together, watched, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from gpu_worker.rank_options import RankOptions, rank_command
from gpu_worker.rank_protocol import FromRank, RankConnection, RankError, RankReady, Stop, ToRank
from wire.errors import ForebayError, ModelError, WireError

log = structlog.get_logger(__name__)

STOP_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 1.0
LAST_WORDS_S = 1.0
SPIN_COUNT = 10_000


class RankLost(ForebayError):
    """A rank exited, hung or sent nonsense; the whole group is of no use without it."""

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
        self._watchers = [
            asyncio.create_task(self._watch(rank), name=f"watch_rank_{rank}")
            for rank in range(1, len(processes))
        ]

    async def wait_ready(self, timeout_s: float) -> RankReady:
        """Wait until all ranks have loaded the model.

        Raises ModelError as the rank reports it, RankLost when a rank dies or takes too long.
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
        """The next frame from rank 0. Raises RankLost, or ModelError if that is what it says."""
        try:
            frame = await self._connection.receive()
        except WireError as error:
            raise RankLost(f"rank 0 sent what is no frame: {error}") from error
        if frame is None:
            raise RankLost(self._first_exit or await self._exit_of(0))
        if isinstance(frame, RankError):
            raise _reported(frame)
        return frame

    async def send(self, frame: ToRank) -> None:
        """Send to rank 0. Raises RankLost when it is gone."""
        try:
            await self._connection.send(frame)
        except ConnectionError as error:
            raise RankLost(await self._exit_of(0)) from error

    async def close(self) -> None:
        """Stop all ranks, by force those that do not stop by themselves; leave none behind."""
        for watcher in self._watchers:
            watcher.cancel()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT_S):  # a rank that hangs reads nothing
                await self._connection.send(Stop())
        exits = asyncio.gather(*(process.wait() for process in self._processes))
        # A rank that still loads reads no frame; one that is gone leaves the others waiting for
        # it in a collective.
        patience_s = STOP_TIMEOUT_S if self._ready and self._all_running else LAST_WORDS_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(exits), patience_s)
        for rank, process in enumerate(self._processes):
            if process.returncode is None:
                if self._ready:
                    log.warning("rank killed", rank=rank, pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        await exits
        await self._connection.close()

    async def _watch(self, rank: int) -> None:
        """Wake whoever waits for rank 0 when another rank is gone: it would wait forever."""
        first_exit = await self._exit_of(rank)
        # Where one cause ends all ranks, rank 0 has the better message: let it have its say.
        await asyncio.sleep(LAST_WORDS_S)
        self._first_exit = first_exit
        await self._connection.close()

    @property
    def _all_running(self) -> bool:
        return all(process.returncode is None for process in self._processes)

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
    """Start `size` ranks; stop them at the end, whatever happens."""
    # Private: whoever can write the rendezvous file can join the group.
    folder = Path(tempfile.mkdtemp(prefix="forebay-ranks-"))
    ours, theirs = socket.socketpair()
    processes: list[asyncio.subprocess.Process] = []
    try:
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
                        env=_rank_environment(),
                        pass_fds=() if inherited is None else (inherited,),
                    )
                )
        group = RankGroup(processes, await RankConnection.open(ours))
        try:
            yield group
        finally:
            await group.close()
    finally:
        for process in processes:  # none, but where not even all could be started
            if process.returncode is None:
                process.kill()
                await process.wait()
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)


def _rank_environment() -> dict[str, str]:
    """Ours, with torch's threads told to spin only shortly while they wait for each other.

    On an idle machine spinning is faster than sleeping; on a busy one it takes the core away from
    the very thread that is waited for (docs/LOG.md has the figures). It must be set before torch is
    loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return dict(os.environ)
    return {**os.environ, "GOMP_SPINCOUNT": str(SPIN_COUNT)}


def _reported(frame: RankError) -> ForebayError:
    if frame.code == ModelError.code:
        return ModelError(frame.message)
    return RankLost(f"rank 0 failed: {frame.message}")
