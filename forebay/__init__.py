"""Forebay: an asynchronous batch inference pipeline for large language models.

    from forebay import Producer, SamplingParams

This is all that users import. Each name is loaded when it is first used, so that
`import forebay` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.address import local_url
    from producer import (
        Consumer,
        Delivery,
        Producer,
        RequestHandle,
        StreamPosition,
        SyncHandle,
        SyncProducer,
    )
    from wire.errors import (
        ConfigError,
        ForebayError,
        IntakeFull,
        InvalidRequest,
        ModelError,
        ProducerClosed,
        RequestCancelled,
        RequestExpired,
        RequestFailed,
        RequestTooLong,
        ResultGone,
        ServerUnreachable,
        WireError,
    )
    from wire.messages import ChatMessage, Chunk, Prompt, Request, Result
    from wire.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "ChatMessage",
    "Chunk",
    "ConfigError",
    "Consumer",
    "Delivery",
    "ForebayError",
    "IntakeFull",
    "InvalidRequest",
    "ModelError",
    "Producer",
    "ProducerClosed",
    "Prompt",
    "Request",
    "RequestCancelled",
    "RequestExpired",
    "RequestFailed",
    "RequestHandle",
    "RequestTooLong",
    "Result",
    "ResultGone",
    "SamplingParams",
    "ServerUnreachable",
    "StreamPosition",
    "SyncHandle",
    "SyncProducer",
    "WireError",
    "__version__",
    "local_url",
]

_HOMES = {
    **dict.fromkeys(
        (
            "Consumer",
            "Delivery",
            "Producer",
            "RequestHandle",
            "StreamPosition",
            "SyncHandle",
            "SyncProducer",
        ),
        "producer",
    ),
    **dict.fromkeys(("ChatMessage", "Chunk", "Prompt", "Request", "Result"), "wire.messages"),
    "SamplingParams": "wire.sampling",
    "local_url": "forebay.address",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "wire.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
