"""Submitting requests, waiting for what becomes of them, and offline batch runs.

Each name is loaded when it is first used: `producer.batch` looks at its files before it knows
whether there is anything to submit, and the Redis client takes a tenth of a second to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.consumer import Consumer, Delivery
    from producer.dead_letters import DeadLetter, DeadLetters
    from producer.handle import RequestHandle
    from producer.position import StreamPosition
    from producer.producer import Producer
    from producer.sync import SyncHandle, SyncProducer

__all__ = [
    "Consumer",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Producer",
    "RequestHandle",
    "StreamPosition",
    "SyncHandle",
    "SyncProducer",
]

_HOMES = {
    "Consumer": "producer.consumer",
    "DeadLetter": "producer.dead_letters",
    "DeadLetters": "producer.dead_letters",
    "Delivery": "producer.consumer",
    "Producer": "producer.producer",
    "RequestHandle": "producer.handle",
    "StreamPosition": "producer.position",
    "SyncHandle": "producer.sync",
    "SyncProducer": "producer.sync",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
