"""Choosing the paged-attention implementation: once per process, and said aloud."""

from __future__ import annotations

import structlog
import torch

from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.interface import AttentionBackend
from gpu_worker.attention.reference import ReferenceAttention


def choose_attention(device: torch.device) -> AttentionBackend:
    """The fastest implementation for `device`, logged with the reason."""
    backend: AttentionBackend
    if device.type == "cpu":
        backend, name, reason = CpuAttention, "cpu", "the model is on the CPU"
    else:
        backend, name = ReferenceAttention, "reference"
        reason = f"there is no kernel for {device.type} yet; this one is slow"
    structlog.get_logger(__name__).info("attention_chosen", backend=name, reason=reason)
    return backend
