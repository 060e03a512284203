"""`python -m gpu_worker`, which is also `forebay worker`."""

from __future__ import annotations

import sys

from service.command import run_command, service_command
from service.settings import WorkerSettings


async def _run(settings: WorkerSettings) -> None:
    # Imported late, so that `--help` stays quick.
    from gpu_worker import service

    await service.run(settings)


command = service_command(
    name="worker",
    settings=WorkerSettings,
    run=_run,
    short_help="Run a worker group.",
    help_text=(
        "Run a worker group: one model, sharded over one or more ranks. SIGTERM drains it: it "
        "takes no more requests, finishes what it runs, and leaves."
    ),
    example="forebay worker --model model.gguf --tensor-parallel-size 2",
)

if __name__ == "__main__":
    sys.exit(run_command(command))
