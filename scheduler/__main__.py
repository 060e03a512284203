"""`python -m scheduler`, which is also `forebay scheduler`."""

from __future__ import annotations

import sys

from service.command import run_command, service_command
from service.settings import SchedulerSettings


async def _run(settings: SchedulerSettings) -> None:
    # Imported late, so that `--help` stays quick.
    from scheduler import service

    await service.run(settings)


command = service_command(
    name="scheduler",
    settings=SchedulerSettings,
    run=_run,
    short_help="Run a scheduler.",
    help_text=(
        "Run a scheduler: it batches the queued requests and routes them to worker groups. "
        "SIGTERM stops it in an orderly way; several of them may run side by side."
    ),
    example="forebay scheduler --redis redis://127.0.0.1:6379/0",
)

if __name__ == "__main__":
    sys.exit(run_command(command))
