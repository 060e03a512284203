"""Commands made from settings: each field of a settings class becomes a flag.

The flag, the environment variable, the default, the limits and the help text of a value all come
from the one place where the field is declared.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
import structlog
from pydantic import SecretStr

from service import logs
from service.exit_codes import exit_code
from service.settings import CommonSettings, flag, variable
from wire.errors import ForebayError
from wire.redaction import mask_passwords

S = TypeVar("S", bound=CommonSettings)
F = TypeVar("F", bound=Callable[..., Any])


def settings_options(
    cls: type[CommonSettings],
    *,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
) -> Callable[[F], F]:
    """Add a click option for each field of `cls`, or for those in `only`, but not in `exclude`.

    An option that is not given is passed as None: the settings class knows the default, and
    converts and checks what is given.
    """

    def add(function: F) -> F:
        for name in reversed(cls.model_fields):
            if (only is None or name in only) and name not in exclude:
                function = _option(cls, name)(function)
        return function

    return add


def service_command(
    *,
    name: str,
    settings: type[S],
    run: Callable[[S], Coroutine[Any, Any, None]],
    short_help: str,
    help_text: str,
    example: str,
) -> click.Command:
    """A command that reads `settings`, sets up the logs, and runs the service until it ends.

    `help_text` is one paragraph; `example` is a command line.
    """

    @click.command(
        name,
        short_help=short_help,
        help=f"{help_text}\n\nExample:\n\n\b\n  {example}",
        context_settings={"max_content_width": 100},
    )
    @settings_options(settings)
    def command(**flags: Any) -> None:
        loaded = settings.load(**flags)
        logs.configure(level=loaded.log_level, log_format=loaded.log_format, service=name)
        structlog.get_logger().info("starting", server=loaded.redis_url_for_logs)
        asyncio.run(run(loaded), debug=False)

    return command


def run_command(command: click.Command, arguments: list[str] | None = None) -> int:
    """Run `command` and return the exit code; errors that are foreseen become one line on stderr.

    One that nobody foresaw keeps its traceback: it is our bug, and the traceback is the report.
    """
    try:
        outcome = command.main(args=arguments, standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code
    except ForebayError as error:
        complain(str(error))
        return exit_code(error)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        return exit_code(KeyboardInterrupt())
    return outcome if isinstance(outcome, int) else 0


def complain(message: str) -> None:
    """Say in one line on stderr what went wrong; passwords in URLs are masked."""
    line = " ".join(mask_passwords(message).split())
    print(f"{ERROR_PREFIX}{line}", file=sys.stderr, flush=True)


ERROR_PREFIX = "error: "
"""What the last line on stderr of a process that failed starts with; its parent looks for it."""


def _option(cls: type[CommonSettings], name: str) -> Callable[[F], F]:
    field = cls.model_fields[name]
    default = "" if field.default is None or field.is_required() else _shown(field.default)
    source = f"[{variable(name)}{default}]"
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return click.option(
        flag(cls, name),
        name,
        type=_click_type(field.annotation),
        metavar=str(extra["metavar"]) if "metavar" in extra else None,
        help=f"{field.description}  {source}",
    )


def _shown(default: object) -> str:
    text = default.get_secret_value() if isinstance(default, SecretStr) else str(default)
    return f", default {text}"


def _click_type(annotation: Any) -> click.ParamType[Any]:
    """Only what helps a reader of the help text; pydantic does the converting and checking."""
    kind = _bare(annotation)
    if get_origin(kind) is Literal:
        return click.Choice([str(value) for value in get_args(kind)], case_sensitive=False)
    return _Text({int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT"))


def _bare(annotation: Any) -> Any:
    """The type without `| None` and without constraints."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _bare(next(kind for kind in get_args(annotation) if kind is not type(None)))
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    return annotation


class _Text(click.ParamType[str]):
    """A value that is passed on as it was typed, under a name that tells what is expected."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name
