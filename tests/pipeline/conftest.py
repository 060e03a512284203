"""The services as processes of their own, around the stub engine, on a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

STUB = ("gpu_worker", "--model", "stub:")
SLOW = ("gpu_worker", "--model", "stub:5ms")
"""A group that is not done with a request before anything can happen to it: its steps take 5 ms."""

SCHEDULER = ("scheduler",)


class Services:
    """Starts and ends services on one server."""

    def __init__(self, redis_url: str, log_dir: Path) -> None:
        self._environment = os.environ | {"FOREBAY_REDIS_URL": redis_url}
        self._log_dir = log_dir
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start `python -m ARGUMENTS`, with settings as environment variables."""
        variables = {f"FOREBAY_{name.upper()}": str(value) for name, value in settings.items()}
        log = self._log_dir / f"{len(self._processes)}-{arguments[0]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self._environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        """What a service has logged so far."""
        index = self._processes.index(process)
        return next(self._log_dir.glob(f"{index}-*.log")).read_text()

    def wait_for_log(self, process: subprocess.Popen[bytes], text: str) -> None:
        """Wait until a service has logged something."""
        give_up_s = time.monotonic() + 30
        while text not in self.log(process):
            assert process.poll() is None, f"ended with {process.returncode}: {self.log(process)}"
            assert time.monotonic() < give_up_s, f"{text!r} is not in {self.log(process)}"
            time.sleep(0.01)

    def end(self, process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        process.send_signal(how)
        return process.wait(timeout=30)

    def end_all(self) -> None:
        """End what still runs; a service that was asked to end must end well."""
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                assert process.wait(timeout=30) == 0, self.log(process)
            finally:
                process.kill()

    def kill_all(self) -> None:
        """End what still runs at once, in tests that are not about its end."""
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def services(redis_url: str, tmp_path: Path) -> Iterator[Services]:
    """A way to start services; they are ended after the test."""
    services = Services(redis_url, tmp_path)
    try:
        yield services
    finally:
        services.end_all()


@pytest.fixture
def pipeline(services: Services) -> Services:
    """A scheduler and one group with the stub engine."""
    services.start(*SCHEDULER)
    services.start(*STUB)
    return services
