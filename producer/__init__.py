"""Submitting requests, waiting for what becomes of them, and offline batch runs."""

from producer.consumer import Consumer, Delivery
from producer.handle import RequestHandle
from producer.producer import Producer
from producer.sync import SyncHandle, SyncProducer

__all__ = [
    "Consumer",
    "Delivery",
    "Producer",
    "RequestHandle",
    "SyncHandle",
    "SyncProducer",
]
