"""Submitting requests, waiting for what becomes of them, and offline batch runs."""

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
