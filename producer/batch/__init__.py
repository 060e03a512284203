"""Offline batch runs: a JSONL file of OpenAI batch rows in, one of OpenAI output objects out."""

from producer.batch.batch_producer import BatchProducer, IdleProducer
from producer.batch.files import BatchFiles, open_files
from producer.batch.options import BatchOptions
from producer.batch.report import BatchProgress, BatchSummary, NoProgress
from producer.batch.resumption import Resumption, find_ended
from producer.batch.row import BatchRow, RowFailure, parse_row
from producer.batch.runner import run_batch

__all__ = [
    "BatchFiles",
    "BatchOptions",
    "BatchProducer",
    "BatchProgress",
    "BatchRow",
    "BatchSummary",
    "IdleProducer",
    "NoProgress",
    "Resumption",
    "RowFailure",
    "find_ended",
    "open_files",
    "parse_row",
    "run_batch",
]
