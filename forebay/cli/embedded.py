"""The options of commands that bring up a pipeline of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from service import logs
from service.command import settings_options
from service.settings import CommonSettings, LocalSettings, WorkerSettings

F = TypeVar("F", bound=Callable[..., Any])

_ENGINE_FIELDS = (
    "model",
    "served_model_name",
    "tensor_parallel_size",
    "dtype",
    "quantization",
    "cpu_isa",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "kv_cache_dtype",
    "kv_cache_bytes",
    "threads",
)


def engine_options(function: F) -> F:
    """Options for the workers of an embedded pipeline; the rest of theirs are variables only."""
    return settings_options(WorkerSettings, only=_ENGINE_FIELDS)(function)


def local_options(*fields: str) -> Callable[[F], F]:
    """Options for the named fields of LocalSettings."""
    return settings_options(LocalSettings, only=fields)


def take_engine_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Remove the workers' flags from `flags`, and return those that were given."""
    taken = {name: flags.pop(name) for name in _ENGINE_FIELDS}
    return {name: value for name, value in taken.items() if value is not None}


def load_local(flags: Mapping[str, object], *, verbose: bool) -> LocalSettings:
    """Settings from the flags that LocalSettings knows; sets up the logs of this process.

    A command that is watched through its progress tells little else: warnings, unless `verbose`.
    """
    known = {name: value for name, value in flags.items() if name in LocalSettings.model_fields}
    settings = LocalSettings.load(**known)
    configure_logs(settings, quiet=not verbose)
    return settings


def configure_logs(settings: CommonSettings, *, quiet: bool) -> None:
    """Set up the logs of a command; `quiet` holds back what is less than a warning."""
    level = "warning" if quiet and settings.log_level in ("debug", "info") else settings.log_level
    logs.configure(level=level, log_format=settings.log_format, service="forebay")
