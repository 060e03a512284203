"""`forebay dead-letters`: look into the requests that failed for good; replay or drop them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forebay.address import server_url
from forebay.cli import dead_letters_view as view
from forebay.cli.embedded import load_local, local_options
from forebay.cli.redis_option import redis_option
from service.command import complain, settings_options
from service.exit_codes import ExitCode, exit_code
from service.settings import CommonSettings
from wire.errors import ForebayError, ResultGone, WireError

if TYPE_CHECKING:
    from producer import DeadLetters
    from wire.ids import RequestId

Returned = TypeVar("Returned")
F = TypeVar("F", bound=Callable[..., Any])


@click.group("dead-letters", short_help="Look into what failed for good; replay or drop it.")
def dead_letters_command() -> None:
    """Requests that failed for good: their groups crashed, or errors used up their attempts.

    The newest 10,000 are kept, each for seven days. A replay makes a new request of one.

    Example:

    \b
      forebay dead-letters replay --all --reason worker_lost
    """


def _pipeline_options(*local_fields: str) -> Callable[[F], F]:
    """The options that all four have: JSON, where the pipeline is, and the logs."""

    def add(function: F) -> F:
        function = settings_options(CommonSettings, only=("namespace", "log_level", "log_format"))(
            function
        )
        function = redis_option(local_options("state_dir", *local_fields)(function))
        return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)

    return add


def _selection(function: F) -> F:
    """Dead letters by their ids, or all, or all with a reason."""
    function = click.option("--reason", metavar="WORD", help="With --all: those with this reason.")(
        function
    )
    function = click.option("--all", "take_all", is_flag=True, help="All there are.")(function)
    return click.argument("request_ids", metavar="[ID]...", nargs=-1)(function)


@dead_letters_command.command("list", short_help="Show the newest, without their prompts.")
@click.option("--reason", metavar="WORD", help="Only those with this reason.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many."
)
@_pipeline_options()
def list_command(reason: str | None, limit: int, as_json: bool, **flags: Any) -> None:
    """List dead letters, newest first.

    Example:

    \b
      forebay dead-letters list --reason worker_lost
    """
    # One more than is shown, to know whether that is all.
    letters = _run(flags, lambda letters: letters.newest(limit + 1, reason=reason))
    shown = letters[:limit]
    if as_json:
        print(json.dumps([view.as_json(letter) for letter in shown], indent=2))
    else:
        print("\n".join(view.table(shown)) if shown else "no dead letters")
    if len(letters) > limit:
        print(f"there are more than these {limit}; --limit shows them", file=sys.stderr)


@dead_letters_command.command("show", short_help="Show all there is of one.")
@click.argument("request_id", metavar="ID")
@click.option("--prompt", "with_prompt", is_flag=True, help="Show the prompt too.")
@_pipeline_options()
def show_command(request_id: str, with_prompt: bool, as_json: bool, **flags: Any) -> None:
    """Show the dead letter ID.

    Example:

    \b
      forebay dead-letters show nightly-17 --prompt
    """
    letter = _run(flags, lambda letters: letters.show(request_id))
    if as_json:
        print(json.dumps(view.as_json(letter, with_prompt=with_prompt), indent=2))
    else:
        print("\n".join(view.details(letter, with_prompt=with_prompt)))


@dead_letters_command.command("replay", short_help="Submit some or all once more.")
@_selection
@_pipeline_options("max_queued")
def replay_command(
    request_ids: tuple[str, ...], take_all: bool, reason: str | None, as_json: bool, **flags: Any
) -> int:
    """Make a new request of each of these dead letters, under an id of its own.

    Example:

    \b
      forebay dead-letters replay nightly-17
    """
    _check_selection(request_ids, take_all, reason)
    replayed: dict[str, RequestId] = {}
    errors: list[ForebayError] = []

    async def replay(letters: DeadLetters) -> None:
        for request_id in request_ids or await letters.ids(reason=reason):
            try:
                replayed[request_id] = await letters.replay(request_id)
            except (ResultGone, WireError) as error:
                errors.append(error)

    try:
        _run(flags, replay)
        code = ExitCode.REQUESTS_FAILED if errors else ExitCode.OK
    except ForebayError as fatal:
        # The rest would fare no better. What was replayed is told all the same.
        errors.append(fatal)
        code = exit_code(fatal)
    if as_json:
        print(json.dumps({"replayed": replayed}, indent=2))
    else:
        for request_id, new_id in replayed.items():
            print(f"{request_id} -> {new_id}")
    for error in errors:
        complain(str(error))
    return code


@dead_letters_command.command("drop", short_help="Delete some or all.")
@_selection
@click.option("--yes", is_flag=True, help="Do not ask.")
@_pipeline_options()
def drop_command(
    request_ids: tuple[str, ...],
    take_all: bool,
    reason: str | None,
    yes: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Delete these dead letters, and their prompts with them.

    Example:

    \b
      forebay dead-letters drop --all --reason wire_error --yes
    """
    _check_selection(request_ids, take_all, reason)
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("stdin is no terminal, where you could be asked; give --yes")
    chosen = request_ids or tuple(_run(flags, lambda letters: letters.ids(reason=reason)))
    if chosen and not yes:
        click.confirm(f"Delete {view.count(len(chosen), 'dead letter')}?", abort=True, err=True)
    dropped = _run(flags, lambda letters: letters.drop(*chosen))
    print(json.dumps({"dropped": dropped}, indent=2) if as_json else f"dropped {len(dropped)}")
    missing = [request_id for request_id in request_ids if request_id not in dropped]
    for request_id in missing:
        complain(f"there is no dead letter {request_id!r}; `forebay dead-letters list` shows them")
    return ExitCode.REQUESTS_FAILED if missing else ExitCode.OK


def _check_selection(request_ids: tuple[str, ...], take_all: bool, reason: str | None) -> None:
    if bool(request_ids) == take_all:
        raise click.UsageError("give either the ids of dead letters or --all")
    if reason is not None and not take_all:
        raise click.UsageError("--reason chooses among --all; ids are chosen already")


def _run(flags: dict[str, Any], work: Callable[[DeadLetters], Awaitable[Returned]]) -> Returned:
    settings = load_local(flags, verbose=False)

    async def run() -> Returned:
        from producer import DeadLetters

        async with DeadLetters(
            server_url(settings), namespace=settings.namespace, max_queued=settings.max_queued
        ) as letters:
            return await work(letters)

    return asyncio.run(run())
