"""How much memory the KV-cache gets when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPU_TOKENS = 20_480
"""What the KV-cache holds on the CPU, at least one sequence of full length apart: 160 tokens for
each of 128 sequences. More would seldom be used at a time, but would in time be filled."""

CPU_SHARE = 0.25
CUDA_SHARE = 0.85
"""Of what is free once the weights are loaded; the rest is for activations and the allocator."""

MAX_HOST_BYTES = 4 * 2**30
HOST_SHARE = 0.25
"""Of what the machine has available, for all ranks together."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def default_kv_cache_bytes(
    device: torch.device, num_ranks: int, *, bytes_per_token: int, max_model_len: int
) -> int:
    """Bytes for one rank's pages, of which a token takes `bytes_per_token`.

    On the CPU the ranks share one memory with everything else: CPU_TOKENS, or one sequence of
    `max_model_len`, within a quarter of what is available, divided among the ranks. On a GPU: 85%
    of what is free on it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    wanted = max(CPU_TOKENS, max_model_len) * bytes_per_token
    return min(int(available_memory_bytes() * CPU_SHARE / num_ranks), wanted)


def default_host_cache_bytes(device: torch.device, num_ranks: int) -> int:
    """Bytes of host memory for one rank's blocks that have left the device.

    None on the CPU: there it is the pages' own memory, and serves better as a part of them, where
    nothing needs to be copied.
    """
    if device.type == "cpu":
        return 0
    return int(min(available_memory_bytes() * HOST_SHARE, MAX_HOST_BYTES) / num_ranks)


def available_memory_bytes() -> int:
    """What this machine, or the container that we are in, can still give without swapping."""
    available = _machine_available_bytes()
    limit = _read_number(_CGROUP / "memory.max")
    used = _read_number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used + _reclaimable_bytes(), 0))
    return available


def _reclaimable_bytes() -> int:
    """The container's cached files, which count as used: a model that was just read is one."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _machine_available_bytes() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Other systems do not say what is available: take half of what is there.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _read_number(path: Path) -> int | None:
    """The number in a control file; None if there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
