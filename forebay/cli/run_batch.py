"""`forebay run-batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
    from producer.batch import BatchFiles, BatchOptions, BatchProducer, BatchSummary

    Run: TypeAlias = Callable[[BatchProducer, Progress], Coroutine[Any, Any, BatchSummary]]


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
@click.option(
    "--retry-failed", is_flag=True, help="Take failed rows out of the output, and run them again."
)
@click.option(
    "--restart", is_flag=True, help="Run all rows, and lose what the output files hold already."
)
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
    retry_failed: bool,
    restart: bool,
    verbose: bool,
    **flags: Any,
) -> int:
    """Answer every request in a JSONL file (OpenAI's batch format), in completion order.

    Answers are appended as they come. The same command given again, after an interruption or a
    crash of any kind, goes on from what the output holds: rows that have ended, answered or
    failed, are not run again. (Standard output cannot be gone on from.) The model is a
    safetensors directory or a GGUF file.

    Example:

    \b
      forebay run-batch -i prompts.jsonl -o answers.jsonl --model model.gguf
    """
    # Imported late, so that `--help` stays quick.
    from producer.batch import BatchOptions, open_files

    engine_flags = take_engine_flags(flags)
    settings = load_local(flags, verbose=verbose)
    options = BatchOptions(
        input_path, output_path, errors=errors, restart=restart, retry_failed=retry_failed
    )
    if max_line_bytes is not None:
        options = replace(options, max_line_bytes=max_line_bytes)
    embedded = _is_embedded(settings, engine_flags, redis_given=flags["redis_url"] is not None)
    with open_files(options) as files:
        summary = asyncio.run(
            _run(options, files, settings, engine_flags if embedded else None, verbose)
        )
    if summary is None:
        print(_interrupted(files), file=sys.stderr)
        return ExitCode.INTERRUPTED
    for line in summary_lines(summary):
        print(line, file=sys.stderr)
    num_failed = summary.num_failed + summary.num_resumed_failed
    return ExitCode.REQUESTS_FAILED if num_failed else ExitCode.OK


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


def _interrupted(files: BatchFiles) -> str:
    told = f"interrupted; the answers so far are in {files.output.name}"
    return f"{told}, and the same command goes on from there" if files.output.is_resumable else told


async def _run(
    options: BatchOptions,
    files: BatchFiles,
    settings: LocalSettings,
    engine_flags: dict[str, object] | None,
    verbose: bool,
) -> BatchSummary | None:
    """The summary, or None if the run was stopped; `engine_flags` None uses running services."""
    from producer.batch import IdleProducer, find_ended, run_batch

    async with shutdown_signals() as stop:
        # Before anything is started: what stands in the output may not fit, or may be all.
        found = await unless_stopped(find_ended(options, files), stop)
        if found is None:
            return None
        run = partial(run_batch, options, files=files, resumption=found)
        with closing(found):
            if found.num_left == 0:
                with Progress() as progress:
                    return await unless_stopped(run(IdleProducer(), progress), stop)
            if engine_flags is None:
                url = settings.redis_url.get_secret_value()
                return await unless_stopped(_run_with(run, settings, url), stop)
            with run_directory() as directory:
                return await _run_embedded(run, settings, engine_flags, directory, verbose, stop)


async def _run_embedded(
    run: Run,
    settings: LocalSettings,
    engine_flags: dict[str, object],
    directory: Path,
    verbose: bool,
    stop: asyncio.Event,
) -> BatchSummary | None:
    async with local_pipeline(
        directory, settings=settings, worker_flags=engine_flags, verbose=verbose
    ) as pipeline:
        summary = await pipeline.run(_run_with(run, settings, pipeline.url), stop=stop)
        if summary is None:
            pipeline.hurry()
        return summary


async def _run_with(run: Run, settings: LocalSettings, url: str) -> BatchSummary:
    """Run the batch with the services on the server at `url`."""
    from producer import Producer

    async with Producer(
        url,
        namespace=settings.namespace,
        max_queued=settings.max_queued,
        result_ttl_s=settings.result_ttl_s,
    ) as producer:
        with Progress() as progress:
            return await run(producer, progress)
