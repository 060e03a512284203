"""The compiled kernels: loaded once, with what they may use of the processor."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog

from gpu_worker.kernels.build import LIBRARY_NAME, source_digest
from wire.errors import ConfigError

Isa: TypeAlias = Literal["avx512", "amx"]
"""Sets of instructions, each with all before it: AVX-512 with VNNI; AMX for bfloat16 and int8."""

ISA_VARIABLE = "FOREBAY_CPU_ISA"
_LEVELS: dict[str, int] = {"torch": 0, "avx512": 1, "amx": 2, "auto": 2}

POINTER = ctypes.c_void_p
INT64 = ctypes.c_int64
FLOAT = ctypes.c_float


@lru_cache(maxsize=1)
def shared_object() -> ctypes.CDLL | None:
    """The library as a file of this machine's; None, and the reason in the log, without it.

    Raises ConfigError for a FOREBAY_CPU_ISA that is none.
    """
    log = structlog.get_logger(__name__)
    if _most() == "torch":
        log.info("cpu_kernels_off", reason=f"{ISA_VARIABLE} is torch")
        return None
    path = Path(__file__).resolve().parent / LIBRARY_NAME
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning(
            "cpu_kernels_absent",
            reason=str(error),
            remedy="install a C++ compiler and run python -m gpu_worker.kernels.build",
        )
        return None
    library.fb_source_digest.restype = ctypes.c_char_p
    if library.fb_source_digest().decode() != source_digest():
        log.warning(
            "cpu_kernels_outdated",
            reason="the library was built from other sources",
            remedy="run python -m gpu_worker.kernels.build",
        )
        return None
    return library


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL, Isa] | None:
    """The library and what it uses; None if this machine runs on torch's operations.

    The environment's FOREBAY_CPU_ISA, a setting of workers, is the most that may be used: amx,
    avx512, or torch for no kernels at all. Logged once, with the reason. Raises ConfigError as
    `shared_object` does.
    """
    log = structlog.get_logger(__name__)
    library = shared_object()
    if library is None:
        return None
    level = library.fb_initialize(_LEVELS[_most()])
    if level == 0:
        log.info("cpu_kernels_off", reason="the processor has no AVX-512 with VNNI")
        return None
    isa: Isa = "amx" if level == 2 else "avx512"
    log.info("cpu_kernels_loaded", isa=isa)
    return library, isa


def _most() -> str:
    most = os.environ.get(ISA_VARIABLE, "auto")
    if most not in _LEVELS:
        raise ConfigError(f"{ISA_VARIABLE} is {most!r}; it must be one of {', '.join(_LEVELS)}")
    return most


def isa() -> Isa | None:
    """What the kernels use of the processor; None without kernels."""
    loaded = load()
    return None if loaded is None else loaded[1]


def function(name: str, *argument_types: Any) -> Callable[..., None]:
    """A kernel of the library, which must be there (`isa` says so), with its signature declared."""
    loaded = load()
    assert loaded is not None, "kernels are only used where they are there"
    kernel = loaded[0][name]
    kernel.argtypes = argument_types
    kernel.restype = None
    return kernel


def set_num_threads(num_threads: int) -> None:
    """How many threads share a kernel's work from now on, the caller included."""
    if load() is not None:
        function("fb_set_num_threads", INT64)(num_threads)
