"""Importing torch in little more than half the time that it takes by itself.

A rank's start is mostly torch's import, and a good part of that serves nothing that a rank does:

- Python's collector goes through all objects again and again, and all of them are there to stay.
- torch registers in Python, operator by operator, how shapes change (for tensors without data, as
  compilers use them). Whoever needs that can still import it later.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_UNNEEDED = "torch._meta_registrations"


@contextmanager
def quick_imports() -> Iterator[None]:
    """What is imported in this context is not collected, and torch comes without its meta kernels.

    A torch that was imported before stays as it is.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    stands_in = "torch" not in sys.modules
    if stands_in:
        sys.modules[_UNNEEDED] = ModuleType(_UNNEEDED)
    try:
        yield
    finally:
        if stands_in:
            _give_way()
        gc.freeze()
        if was_enabled:
            gc.enable()


def _give_way() -> None:
    """Let the next import of the module find the real one."""
    stand_in = sys.modules.pop(_UNNEEDED, None)
    torch = sys.modules.get("torch")
    name = _UNNEEDED.rpartition(".")[2]
    if torch is not None and getattr(torch, name, None) is stand_in:
        delattr(torch, name)
