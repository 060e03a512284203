"""The option that names a running pipeline's server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def redis_option(function: F) -> F:
    """Add `--redis` to a command that otherwise finds the server of `forebay up`."""
    return click.option(
        "--redis",
        "redis_url",
        metavar="URL",
        help="The pipeline's server. Without it (and FOREBAY_REDIS_URL), that of `forebay up`.",
    )(function)
