"""The machine that a measurement belongs to."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile")
"""Those on which the speed of kernels depends."""


def machine() -> str:
    """Its cores, its processor, and the instruction sets that matter."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name == "model name":
                model = value
            if name == "flags":
                flags = set(value.split())
    except OSError:
        pass  # not Linux
    known = [flag for flag in _ISA_FLAGS if flag in flags]
    return f"{os.cpu_count()} cores, {model}{' with ' if known else ''}{', '.join(known)}"


def load() -> str:
    """A warning if other processes seem to use the machine."""
    busy = os.getloadavg()[0] - (os.cpu_count() or 1)
    return f" (load average {os.getloadavg()[0]:.1f}: not alone)" if busy > 1 else ""
