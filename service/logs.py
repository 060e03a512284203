"""Logs: events with fields, on stderr; readable on a terminal, JSON lines everywhere else.

Entry points call `configure` once. Everybody else writes
`structlog.get_logger().info("group_lost", group_id=group_id)`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from wire.redaction import mask_passwords

if TYPE_CHECKING:
    # Not for ranks: the library behind the settings takes a tenth of a second to import.
    from service.settings import LogFormat, LogLevel


def configure(
    *, level: LogLevel, log_format: LogFormat, service: str, stream: TextIO | None = None
) -> None:
    """Send the events of this process, and those of its libraries, to `stream` (stderr if None).

    `service` names the process in every event. Called again, it replaces what was there.
    """
    stream = sys.stderr if stream is None else stream
    readable = log_format == "console" or (log_format == "auto" and stream.isatty())
    level_number = logging.getLevelNamesMapping()[level.upper()]

    def add_service(_: Any, __: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
    ]
    rendering = [*_rendering(readable, colors=_wants_colors(stream))]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level_number),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    _take_over_standard_logging(stream, level_number, shared, rendering)


def redact(_: Any, __: str, event: EventDict) -> EventDict:
    """Mask the passwords of URLs in every text of the event, exceptions' texts included."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = mask_passwords(value)
    return event


def _rendering(readable: bool, *, colors: bool) -> list[Processor]:
    # Exceptions become text before redaction: a traceback may well quote a URL.
    if readable:
        return [
            structlog.processors.format_exc_info,
            redact,
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24),
        ]
    return [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer()]


def _wants_colors(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _take_over_standard_logging(
    stream: TextIO, level: int, shared: list[Processor], rendering: list[Processor]
) -> None:
    """Libraries log through `logging`: their warnings get the same form."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.WARNING))


def _add_logger_name(_: Any, __: str, event: MutableMapping[str, Any]) -> EventDict:
    event["logger"] = event["_record"].name
    return event
