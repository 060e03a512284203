"""`forebay run-batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.embedded import (
    engine_options,
    load_local,
    local_options,
    take_engine_flags,
)
from forebay.cli.progress import Progress, summary_lines
from forebay.local import local_pipeline
from forebay.paths import run_directory
from service.command import settings_options
from service.exit_codes import ExitCode
from service.lifecycle import shutdown_signals, unless_stopped
from service.settings import CommonSettings, LocalSettings, WorkerSettings, flag
from wire.errors import ConfigError

if TYPE_CHECKING:
    from producer.batch import BatchFiles, BatchOptions, BatchSummary


@click.command(
    "run-batch",
    short_help="Answer a file of requests.",
    context_settings={"max_content_width": 100},
)
@click.option(
    "-i", "--input", "input_path", required=True, metavar="FILE", help="JSONL file, or -."
)
@click.option(
    "-o", "--output", "output_path", required=True, metavar="FILE", help="JSONL file, or -."
)
@click.option(
    "--errors", metavar="FILE", help="Where failed rows go; among the answers if not given."
)
@click.option(
    "--max-line-bytes",
    type=click.IntRange(min=1024),
    metavar="BYTES",
    help="Longer rows fail; 8 MiB if not given.",
)
@click.option("--overwrite", is_flag=True, help="Lose what the output files hold already.")
@click.option("--verbose", is_flag=True, help="Show the logs of all processes.")
@click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help="Use the services that run on this server. Without it (and FOREBAY_REDIS_URL), a "
    "pipeline is brought up for this run.",
)
@engine_options
@local_options("groups", "broker")
@settings_options(CommonSettings, only=("namespace", "log_level", "log_format"))
def run_batch_command(
    input_path: str,
    output_path: str,
    errors: str | None,
    max_line_bytes: int | None,
    overwrite: bool,
    verbose: bool,
    **flags: Any,
) -> int:
    """Answer every request in a JSONL file (OpenAI's batch format), in completion order.

    Answers are appended as they come, so an interrupted run keeps what it has. The model is a
    safetensors directory or a GGUF file.

    Example:

    \b
      forebay run-batch -i prompts.jsonl -o answers.jsonl --model model.gguf
    """
    # Imported late, so that `--help` stays quick.
    from producer.batch import BatchOptions, open_files

    engine_flags = take_engine_flags(flags)
    settings = load_local(flags, verbose=verbose)
    options = BatchOptions(input_path, output_path, errors=errors, overwrite=overwrite)
    if max_line_bytes is not None:
        options = replace(options, max_line_bytes=max_line_bytes)
    embedded = _is_embedded(settings, engine_flags, redis_given=flags["redis_url"] is not None)
    with open_files(options) as files:
        summary = asyncio.run(
            _run_embedded(options, files, settings, engine_flags, verbose)
            if embedded
            else _run_with_services(options, files, settings)
        )
    if summary is None:
        print(f"interrupted; the answers so far are in {files.output.name}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    for line in summary_lines(summary):
        print(line, file=sys.stderr)
    return ExitCode.REQUESTS_FAILED if summary.num_failed else ExitCode.OK


def _is_embedded(
    settings: LocalSettings, engine_flags: dict[str, object], *, redis_given: bool
) -> bool:
    """Whether the run brings its own pipeline: flags say so first, then the environment."""
    if redis_given and engine_flags:
        first = next(iter(engine_flags))
        raise ConfigError(
            f"--redis uses services that are running, and {flag(WorkerSettings, first)} is for "
            "workers that this run would start: give one of them"
        )
    return not redis_given and (bool(engine_flags) or "redis_url" not in settings.model_fields_set)


async def _run_embedded(
    options: BatchOptions,
    files: BatchFiles,
    settings: LocalSettings,
    engine_flags: dict[str, object],
    verbose: bool,
) -> BatchSummary | None:
    with run_directory() as directory:
        async with (
            shutdown_signals() as stop,
            local_pipeline(
                directory, settings=settings, worker_flags=engine_flags, verbose=verbose
            ) as pipeline,
        ):
            work = _run(options, files, settings, pipeline.url)
            summary = await pipeline.run(work, stop=stop)
            if summary is None:
                pipeline.hurry()
            return summary


async def _run_with_services(
    options: BatchOptions, files: BatchFiles, settings: LocalSettings
) -> BatchSummary | None:
    async with shutdown_signals() as stop:
        work = _run(options, files, settings, settings.redis_url.get_secret_value())
        return await unless_stopped(work, stop)


async def _run(
    options: BatchOptions, files: BatchFiles, settings: LocalSettings, url: str
) -> BatchSummary:
    from producer import Producer
    from producer.batch import run_batch

    async with Producer(
        url,
        namespace=settings.namespace,
        max_queued=settings.max_queued,
        result_ttl_s=settings.result_ttl_s,
    ) as producer:
        with Progress() as progress:
            return await run_batch(options, producer, progress, files=files)
