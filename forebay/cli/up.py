"""`forebay up`: the whole pipeline on this machine, until it is told to stop."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from forebay.cli.embedded import engine_options, load_local, local_options, take_engine_flags
from forebay.local import LocalPipeline, local_pipeline
from forebay.paths import private_directory
from service.command import settings_options
from service.exit_codes import ExitCode
from service.folders import exclusive
from service.lifecycle import shutdown_signals
from service.settings import CommonSettings, LocalSettings


@click.command(
    "up",
    short_help="Run the whole pipeline on this machine.",
    context_settings={"max_content_width": 100},
)
@engine_options
@local_options("groups", "broker", "state_dir")
@settings_options(CommonSettings, only=("namespace", "log_level", "log_format"))
def up_command(**flags: Any) -> int:
    """Run everything on this machine: an embedded server, a scheduler and worker groups.

    Stays up until Ctrl-C or SIGTERM, then finishes what runs. What is still queued is kept in the
    state directory, and goes on with the next `forebay up`.

    Example:

    \b
      forebay up --model model.gguf
    """
    engine_flags = take_engine_flags(flags)
    settings = load_local(flags, verbose=True)
    directory = private_directory(settings.resolved_state_dir)
    with exclusive(directory):
        asyncio.run(_up(settings, engine_flags))
    return ExitCode.OK


async def _up(settings: LocalSettings, engine_flags: dict[str, object]) -> None:
    async with (
        shutdown_signals() as stop,
        local_pipeline(
            settings.resolved_state_dir, settings=settings, worker_flags=engine_flags, verbose=True
        ) as pipeline,
    ):
        await pipeline.run(_serve(pipeline, settings), stop=stop)
        print("stopping: running requests may finish; Ctrl-C ends them", file=sys.stderr)


async def _serve(pipeline: LocalPipeline, settings: LocalSettings) -> None:
    from forebay.fleet import wait_until_serving

    models = await wait_until_serving(pipeline.url, settings.namespace, num_groups=settings.groups)
    lines = (
        "",
        f"Forebay is up and serves {', '.join(models)}. In another terminal:",
        "",
        '  forebay submit "Why is the sky blue?" --stream',
        f"  forebay run-batch -i prompts.jsonl -o answers.jsonl --redis {pipeline.url}",
        "",
        f'From Python: Producer("{pipeline.url}"). Ctrl-C stops it.',
        "",
    )
    print("\n".join(lines), file=sys.stderr, flush=True)
    await asyncio.Event().wait()
