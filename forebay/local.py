"""The whole pipeline on one machine: a broker, a scheduler and worker groups as our children.

A process that is killed is started again (`forebay/supervision.py`), the broker on the data that
it has written; the others ride out its absence.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forebay.broker import Broker, broker_url
from forebay.broker_binary import find_broker
from forebay.child import Child
from forebay.paths import private_directory
from forebay.supervision import Supervised
from service.lifecycle import unless_stopped
from service.settings import LocalSettings, WorkerSettings, flag, variable
from wire.errors import ModelError

T = TypeVar("T")

_HURRIED_STOP_S = 2.0
_BROKER_STOP_TIMEOUT_S = 10.0


class LocalPipeline:
    """The running pipeline: where its server is, and a watch over its processes."""

    def __init__(self, url: str, patience_s: float) -> None:
        self.url = url
        self._patience_s = patience_s
        self._processes: list[Supervised] = []

    async def run(self, work: Coroutine[Any, Any, T], *, stop: asyncio.Event) -> T | None:
        """The result of `work`; None if `stop` was set before it was done.

        Raises what `work` raises, or why a process of the pipeline ended for good meanwhile.
        """
        return await unless_stopped(self._watched(work), stop)

    def hurry(self) -> None:
        """Nobody waits for what the groups run: let them be ended within moments."""
        self._patience_s = _HURRIED_STOP_S

    async def start(self, process: Supervised) -> None:
        """Start one more process; the first one is the broker."""
        self._processes.append(process)
        await process.start()

    async def stop(self) -> None:
        """End the children, then the broker; nothing that they started is left."""
        broker, *children = self._processes
        await asyncio.gather(*(child.stop(self._patience_s) for child in children))
        await broker.stop(_BROKER_STOP_TIMEOUT_S)

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.TaskGroup() as group:
                watches = [
                    group.create_task(process.keep_up(), name=f"keep-up-{process.name}")
                    for process in self._processes
                ]
                result = await work
                for watch in watches:
                    watch.cancel()
        except ExceptionGroup as group_error:
            # The first is the cause: when a process dies, the work soon fails too.
            raise group_error.exceptions[0] from None
        return result


@asynccontextmanager
async def local_pipeline(
    directory: Path,
    *,
    settings: LocalSettings,
    worker_flags: Mapping[str, object],
    verbose: bool = False,
) -> AsyncIterator[LocalPipeline]:
    """Bring the pipeline up in `directory`, whose lock the caller holds, and take it down again.

    `worker_flags` are fields of WorkerSettings as they were given on the command line; what is
    not given, the workers take from the environment. The pipeline is handed out as soon as the
    server answers: requests can queue up while the model loads. An exception, or being
    cancelled, ends the children quickly; otherwise the groups finish what they run.

    Raises ConfigError or ModelError before anything was started, ServerUnreachable when the
    broker does not come up.
    """
    check_model(WorkerSettings.load(**worker_flags))
    start_broker = partial(
        Broker.start_or_attach,
        directory,
        binary=find_broker(settings.broker),
        timeout_s=settings.start_timeout_s,
    )
    pipeline = LocalPipeline(broker_url(directory), settings.stop_timeout_s)
    await pipeline.start(Supervised("broker", start_broker))
    try:
        environment = _environment(pipeline.url, settings, verbose)
        environment["TMPDIR"] = str(_emptied(directory / "tmp"))
        for name, program in _programs(settings, worker_flags).items():
            log_path = directory / f"{name}.log"
            log_path.unlink(missing_ok=True)
            start_child = partial(
                Child.start,
                name,
                program,
                environment=environment,
                log_path=log_path,
                echo=verbose,
            )
            await pipeline.start(Supervised(name, start_child))
        yield pipeline
    except BaseException:
        pipeline.hurry()
        raise
    finally:
        await pipeline.stop()


def check_model(settings: WorkerSettings) -> None:
    """Raise ModelError when the model is not there: better now than after everything started."""
    path = settings.model_path
    if path is not None and not path.exists():
        raise ModelError(
            f"model {path}: no such file or directory; "
            f"give --model (or {variable('model')}) a safetensors directory or a GGUF file"
        )


def _emptied(temporary: Path) -> Path:
    """The directory for temporary files, without those that killed children have left there."""
    shutil.rmtree(temporary, ignore_errors=True)
    return private_directory(temporary)


def _programs(settings: LocalSettings, worker_flags: Mapping[str, object]) -> dict[str, list[str]]:
    """The command line of each service, by name."""
    # -P: a cache.py in the user's working directory must not be taken for ours.
    python = [sys.executable, "-P", "-m"]
    flags = {name: value for name, value in worker_flags.items() if value is not None}
    if settings.groups > 1:
        workers = WorkerSettings.load(**flags)
        ranks = settings.groups * workers.tensor_parallel_size
        # Each group would otherwise take the whole machine for itself.
        flags.setdefault("threads", workers.threads or max(1, (os.cpu_count() or 1) // ranks))
    arguments = [part for name in flags for part in (flag(WorkerSettings, name), str(flags[name]))]
    names = ["worker"] if settings.groups == 1 else [f"worker-{i}" for i in range(settings.groups)]
    # Workers first: they take longest to start.
    return {
        **{name: [*python, "gpu_worker", *arguments] for name in names},
        "scheduler": [*python, "scheduler"],
    }


def _environment(url: str, settings: LocalSettings, verbose: bool) -> dict[str, str]:
    """Ours, with what the children must agree on. The URL is no argument: `ps` would show it."""
    environment = dict(os.environ)
    if settings.groups > 1:
        # A group's name is its own: each one makes one up.
        environment.pop(variable("group_id"), None)
    readable = settings.log_format == "auto" and verbose and sys.stderr.isatty()
    shared = {
        "redis_url": url,
        "namespace": settings.namespace,
        "log_level": settings.log_level,
        "log_format": "console" if readable else settings.log_format,
    }
    return environment | {variable(name): value for name, value in shared.items()}
