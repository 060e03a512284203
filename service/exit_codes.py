"""The exit codes of every command and service, in one place.

0    all went well
1    the command finished, but some requests or rows failed
2    wrong usage: an argument or a setting that cannot be used
3    a file cannot be used: input, output or model
4    the server cannot be reached, or a part of the pipeline died
130  interrupted (Ctrl-C, or SIGTERM before the work was done)
"""

from __future__ import annotations

from enum import IntEnum

from wire.errors import (
    ConfigError,
    FileError,
    ForebayError,
    IntakeFull,
    InvalidRequest,
    ModelError,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
    ResultGone,
)


class ExitCode(IntEnum):
    """What a process tells its parent."""

    OK = 0
    REQUESTS_FAILED = 1
    USAGE = 2
    UNUSABLE_FILE = 3
    PIPELINE_DOWN = 4
    INTERRUPTED = 130


_REQUEST_ERRORS = (
    InvalidRequest,
    IntakeFull,
    RequestFailed,
    RequestCancelled,
    RequestExpired,
    ResultGone,
)


def exit_code(error: BaseException) -> ExitCode:
    """The exit code that `error` ends a process with."""
    match error:
        case ConfigError():
            return ExitCode.USAGE
        case FileError() | ModelError() | OSError():
            return ExitCode.UNUSABLE_FILE
        case ForebayError() if isinstance(error, _REQUEST_ERRORS):
            return ExitCode.REQUESTS_FAILED
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case _:
            return ExitCode.PIPELINE_DOWN
