"""Every error that a user of Forebay can meet, as one tree.

ForebayError
├── InvalidRequest        the request itself is wrong; sending it again will not help
│   └── RequestTooLong    prompt (plus max_tokens) does not fit the model's context
├── IntakeFull            too much is queued; try again after `retry_after_s`
├── RequestFailed         accepted, and ended without an answer; `code` says why
├── RequestCancelled      ended by `cancel`
├── RequestExpired        ended by its deadline
├── ProducerClosed        the producer was closed while somebody waited on it
├── ResultGone            its result was not read within its time to live, or the server lost it
├── ServerUnreachable     the Redis server cannot be reached, or refuses us
├── WireError             bytes from another process that break the protocol
├── FileError             an input or output file cannot be opened, read or written
├── PipelineFailed        a process of the pipeline ended that should not have
├── ModelError            a model's files are missing, damaged or not supported
└── ConfigError           a setting or an argument that cannot be used
"""

from __future__ import annotations

from typing import ClassVar


class ForebayError(Exception):
    """Base of all errors that Forebay raises on purpose.

    `code` is a stable word for programs; the message is one line for people: what was wrong,
    with which value, and what to do.
    """

    code: ClassVar[str] = "internal_error"


class InvalidRequest(ForebayError):
    """The request cannot be served as it is.

    `field` names the part that is wrong (`"temperature"`, `"messages[2].content"`), or is None
    when it is the request as a whole.
    """

    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTooLong(InvalidRequest):
    """The prompt, or the prompt and `max_tokens` together, exceed the model's context length."""

    code: ClassVar[str] = "context_length_exceeded"


class IntakeFull(ForebayError):
    """The queue is at its limit; nothing was enqueued. Try again after `retry_after_s` seconds."""

    code: ClassVar[str] = "intake_full"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailed(ForebayError):
    """The request was accepted and ended without an answer. `reason` is the stable word for why."""

    code: ClassVar[str] = "request_failed"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestCancelled(ForebayError):
    """The request was cancelled before it finished."""

    code: ClassVar[str] = "cancelled"


class RequestExpired(ForebayError):
    """The request's deadline passed before it finished."""

    code: ClassVar[str] = "expired"


class ResultGone(ForebayError):
    """The request is unknown: never submitted, its result outlived its time to live, or the server
    has lost it.
    """

    code: ClassVar[str] = "result_gone"


class ProducerClosed(ForebayError):
    """The producer was closed; what was submitted goes on, and another producer can wait for it."""

    code: ClassVar[str] = "producer_closed"


class ServerUnreachable(ForebayError):
    """The Redis server does not answer, or answers that it cannot serve us."""

    code: ClassVar[str] = "server_unreachable"


class WireError(ForebayError):
    """Bytes that break the wire format: version, number or type of fields, size."""

    code: ClassVar[str] = "wire_error"


class FileError(ForebayError):
    """An input or output file cannot be opened, read or written; what was written stays."""

    code: ClassVar[str] = "file_error"


class PipelineFailed(ForebayError):
    """A process of the pipeline ended that should not have."""

    code: ClassVar[str] = "pipeline_failed"


class ModelError(ForebayError):
    """A model's files are missing, damaged, or of a kind that is not supported."""

    code: ClassVar[str] = "model_error"


class ConfigError(ForebayError):
    """A setting, a command-line argument or a combination of them cannot be used."""

    code: ClassVar[str] = "config_error"
