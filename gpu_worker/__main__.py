"""`python -m gpu_worker`, which is also `forebay worker`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from service.command import run_command, service_command
from service.settings import WorkerSettings
from wire.errors import ConfigError

# The extra `worker` of pyproject.toml: producers and schedulers do without.
PACKAGES = ("gguf", "numpy", "torch")


async def _run(settings: WorkerSettings) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a worker needs {', '.join(missing)}; install Forebay with its engine: "
            "pip install 'forebay[worker]'"
        )
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
