"""Who plays in a run: a server, schedulers and worker groups, each a process of its own.

    scheduler-0 ── proxy ──┐
    group-0 ────── proxy ──┼── server          clients (producers, consumers: in this process)
      └ rank-0             └── proxy ── clients

Whatever ends is started again after a moment, as any supervisor would. The network between each of
them and the server is a proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from chaos.faults import CLIENTS, Targets
from forebay.broker_binary import BrokerBinary
from forebay.paths import socket_path
from service.die_with_parent import command_line
from support.server_process import ServerProcess, server_process
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until

RESTART_AFTER_S = 0.3
STOP_TIMEOUT_S = 30.0
_ROOT = Path(__file__).resolve().parents[2]


class Service:
    """A scheduler or a group: one process after another."""

    def __init__(
        self, name: str, program: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self.is_held_down = False
        self.exits: Counter[int] = Counter()
        self._program = program
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_s: float | None = None

    @property
    def pid(self) -> int | None:
        """The process that runs now, None if there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a process; the one before has ended."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command_line([sys.executable, *self._program]),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL; its ranks die with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._note_end()

    def look_after(self) -> None:
        """Start again what has ended a moment ago."""
        if self._process is not None and self._process.poll() is not None:
            self._note_end()
        down_s = 0.0 if self._ended_s is None else time.monotonic() - self._ended_s
        if self._process is None and not self.is_held_down and down_s >= RESTART_AFTER_S:
            self.start()

    def ask_to_end(self) -> None:
        """SIGTERM; a second one would not be an orderly end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> int | None:
        """Its exit status after `ask_to_end`, None if it does not obey."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None

    def rank(self) -> psutil.Process | None:
        """The group's rank process, if it has one now."""
        with contextlib.suppress(psutil.Error):
            for child in [] if self.pid is None else psutil.Process(self.pid).children():
                if "gpu_worker.rank" in child.cmdline():
                    return child
        return None

    def _note_end(self) -> None:
        assert self._process is not None
        self.exits[self._process.wait()] += 1
        self._process, self._ended_s = None, time.monotonic()


class Cast:
    """All processes of a run, and the lines between them."""

    def __init__(
        self, server: ServerProcess, services: dict[str, Service], proxies: dict[str, TcpProxy]
    ) -> None:
        self.server = server
        self.services = services
        self.proxies = proxies

    @property
    def url(self) -> str:
        """Where producers and consumers find their server."""
        return self.proxies[CLIENTS].url

    @contextlib.asynccontextmanager
    async def looked_after(self) -> AsyncIterator[None]:
        """While inside, what ends is started again."""
        looking = asyncio.create_task(self._look_after_all(), name="look_after_all")
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look_after_all(self) -> None:
        while True:
            for service in self.services.values():
                service.look_after()
            await asyncio.sleep(0.05)

    def end(self) -> dict[str, int | None]:
        """End the services in an orderly way, and return their exit statuses."""
        for service in self.services.values():
            service.ask_to_end()
        return {name: service.wait() for name, service in self.services.items()}


@contextmanager
def cast(
    binary: BrokerBinary,
    targets: Targets,
    *,
    log_dir: Path,
    seed: int,
    step_s: float,
    settings: Mapping[str, object],
) -> Iterator[Cast]:
    """All processes started, and none of them left afterwards."""
    programs = dict.fromkeys(targets.schedulers, ("-m", "scheduler")) | {
        name: ("-m", "gpu_worker", "--model", f"stub:{step_s * 1000:g}ms", "--group-id", name)
        for name in targets.groups
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")},
        **{f"FOREBAY_{name.upper()}": str(value) for name, value in settings.items()},
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "tests"))),
        "TMPDIR": str(log_dir),  # a group that is killed cannot clean up
    }
    with ExitStack() as stack:
        server = stack.enter_context(server_process(binary))
        proxies = {
            name: stack.enter_context(
                TcpProxy(str(socket_path(server.directory)), seed=seed * 100 + index)
            )
            for index, name in enumerate((*programs, CLIENTS))
        }
        services = {
            name: Service(
                name,
                program,
                environment | {"FOREBAY_REDIS_URL": proxies[name].url},
                log_dir / f"{name}.log",
            )
            for name, program in programs.items()
        }
        for service in services.values():
            stack.callback(service.kill)
            service.start()
        yield Cast(server, services, proxies)


def processes_of(log_dir: Path) -> list[str]:
    """Services and ranks of a run that are still there a moment after its end."""

    def are_left() -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(log_dir):
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
        return found

    wait_until(lambda: not are_left(), timeout_s=2.0)
    return are_left()
