"""Offline batch runs: a JSONL file of OpenAI batch rows in, one of OpenAI output objects out."""

from producer.batch.options import BatchFiles, BatchOptions, open_files
from producer.batch.report import BatchProgress, BatchSummary, NoProgress
from producer.batch.row import BatchRow, RowFailure, parse_row
from producer.batch.runner import BatchProducer, run_batch

__all__ = [
    "BatchFiles",
    "BatchOptions",
    "BatchProducer",
    "BatchProgress",
    "BatchRow",
    "BatchSummary",
    "NoProgress",
    "RowFailure",
    "open_files",
    "parse_row",
    "run_batch",
]
