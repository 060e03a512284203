"""Finding the compiled kernels, and doing without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.kernels import build, library
from gpu_worker.precision import choose_precision
from wire.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out about the library is forgotten before the test, and after it."""
    for found in (library.shared_object, library.load):
        found.cache_clear()
    yield
    monkeypatch.undo()
    for found in (library.shared_object, library.load):
        found.cache_clear()
    library.load()  # sets its bound on the processor back


def test_the_environment_can_switch_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_CPU_ISA", "torch")
    with capture_logs() as logs:
        assert library.isa() is None
    assert logs[0]["event"] == "cpu_kernels_off"
    assert choose_precision("auto", "none", "auto", CPU, head_dim=64).dtype == torch.float32


def test_the_environment_bounds_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.isa() is None:
        pytest.skip("no compiled kernels here")
    library.load.cache_clear()
    monkeypatch.setenv("FOREBAY_CPU_ISA", "avx512")
    assert library.isa() == "avx512"
    assert choose_precision("auto", "none", "auto", CPU, head_dim=64).dtype == torch.float16


def test_an_unknown_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_CPU_ISA", "sse2")
    with pytest.raises(ConfigError, match="FOREBAY_CPU_ISA is 'sse2'; it must be one of"):
        library.isa()


def test_without_a_library_the_log_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY_NAME", str(tmp_path / "missing.so"))
    with capture_logs() as logs:
        assert library.isa() is None
    assert logs[0]["event"] == "cpu_kernels_absent"
    assert "gpu_worker.kernels.build" in logs[0]["remedy"]


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.shared_object() is None:
        pytest.skip("no compiled kernels here")
    library.shared_object.cache_clear()
    monkeypatch.setattr(library, "source_digest", lambda: "another")
    with capture_logs() as logs:
        assert library.isa() is None
    assert logs[0]["event"] == "cpu_kernels_outdated"


def test_a_machine_without_a_compiler_is_told_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "is_supported_platform", lambda: True)
    monkeypatch.setattr(build, "compilers", lambda: iter([[str(tmp_path / "no-compiler")]]))
    with pytest.raises(build.BuildError, match="no-compiler"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_s_complaints_are_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    complaining = [sys.executable, "-c", "import sys; sys.exit('error: no such processor')"]
    monkeypatch.setattr(build, "is_supported_platform", lambda: True)
    monkeypatch.setattr(build, "compilers", lambda: iter([complaining]))
    with pytest.raises(build.BuildError, match="no such processor"):
        build.build(tmp_path / "kernels.so")


def test_other_machines_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(build.BuildError, match="no kernels for riscv64"):
        build.build(tmp_path / "kernels.so")
