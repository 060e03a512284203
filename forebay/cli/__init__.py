"""The `forebay` command. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import click

import forebay
from forebay.cli.dead_letters import dead_letters_command
from forebay.cli.run_batch import run_batch_command
from forebay.cli.status import status_command
from forebay.cli.submit import submit_command
from forebay.cli.up import up_command
from gpu_worker.__main__ import command as worker_command
from scheduler.__main__ import command as scheduler_command
from service.command import run_command

_EPILOG = """\b
Exit codes:
  0    all went well
  1    finished, but some requests or rows failed
  2    wrong usage: an argument or a setting that cannot be used
  3    a file cannot be used: input, output or model
  4    the server cannot be reached, or a part of the pipeline died
  130  interrupted
"""


@click.group(epilog=_EPILOG)
@click.version_option(forebay.__version__, prog_name="forebay", message="%(prog)s %(version)s")
def cli() -> None:
    """Asynchronous batch inference for large language models, pooled in Redis streams.

    Where an option's help names an environment variable, that can be set instead.

    Example:

    \b
      forebay run-batch -i prompts.jsonl -o answers.jsonl --model model.gguf
    """


cli.add_command(run_batch_command)
cli.add_command(up_command)
cli.add_command(submit_command)
cli.add_command(status_command)
cli.add_command(dead_letters_command)
cli.add_command(scheduler_command)
cli.add_command(worker_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (`service.exit_codes` lists them)."""
    return run_command(cli, arguments)
