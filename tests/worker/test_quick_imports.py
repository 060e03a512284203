"""What a rank does without while it imports torch."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
from gpu_worker.quick_imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
    import torch
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert "torch._meta_registrations" not in sys.modules
assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 4), torch.full((2, 4), 3.0))
import torch._meta_registrations
assert torch.empty(2, 3, device="meta").matmul(torch.empty(3, 4, device="meta")).shape == (2, 4)
with quick_imports():  # a torch that is there already stays whole
    import torch
assert "torch._meta_registrations" in sys.modules
"""


def test_torch_works_without_its_meta_kernels_and_gets_them_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert not done.returncode, done.stderr
