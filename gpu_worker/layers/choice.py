"""Choosing the operations that a decoder is made of: once per process, and said aloud."""

from __future__ import annotations

import structlog
import torch

from gpu_worker.layers.native_operations import native_operations
from gpu_worker.layers.operations import Operations
from gpu_worker.layers.torch_operations import torch_operations
from gpu_worker.precision import Precision


def choose_operations(precision: Precision, device: torch.device) -> Operations:
    """Our kernels where there are some for `device`, else torch's operations."""
    log = structlog.get_logger(__name__)
    if precision.isa is not None:
        log.info("operations_chosen", operations="native", isa=precision.isa)
        return native_operations(precision)
    log.info("operations_chosen", operations="torch", device=device.type)
    return torch_operations(precision, device)
