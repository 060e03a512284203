"""Random numbers that depend on a request's seed and the position in its output, nothing else.

So a seeded request draws the same tokens whatever else is in the batch, on whichever worker, and
after a preemption or a crash as if nothing had happened: there is no generator state to lose.

The mixing function is SplitMix64's finalizer (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt64s: TypeAlias = npt.NDArray[np.uint64]

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SEED_MASK = (1 << 64) - 1
_UNIFORM_BITS = 48
_UNIFORM_STEP = 1.0 / (1 << _UNIFORM_BITS)


def seed_to_uint64(seed: int | None) -> int:
    """The seed as an unsigned 64-bit number; one from the operating system for None."""
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    return seed & _SEED_MASK


def uniforms(seeds: UInt64s, positions: UInt64s) -> npt.NDArray[np.float64]:
    """One number for each pair, strictly between 0 and 1, from 48 random bits."""
    # Mixing the seed first keeps the streams of related seeds apart.
    bits = _mix(_mix(seeds + _WEYL) + positions * _WEYL)
    # Midpoints of 2**48 intervals: multiplying a sum by one never rounds up to that sum.
    steps = (bits >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64)
    return (steps + 0.5) * _UNIFORM_STEP


def _mix(z: UInt64s) -> UInt64s:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
