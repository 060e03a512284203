"""Imports point one way, and what must start fast loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each package may import of ours. `service` uses the vocabulary of `wire` (its errors, its
# client); `wire` itself rests on nothing.
MAY_IMPORT = {
    "wire": set[str](),
    "service": {"wire"},
    "cache": {"wire"},
    "producer": {"wire"},
    "scheduler": {"wire", "service", "cache"},
    "gpu_worker": {"wire", "service", "cache"},
    "forebay": {"wire", "service", "cache", "producer", "scheduler", "gpu_worker"},
}

# What rests on what inside the worker: our kernels on nothing of it, what is computed with them on
# them alone. Attention takes the plan of a step besides.
MAY_IMPORT_OF_WORKER = {
    "kernels": set[str](),
    "collectives": {"kernels"},
    "attention": {"kernels", "step_plan"},
}


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Modules, and names that may be modules: `from a.b import c` is a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for path in modules_of(package):
        ours = imported_packages(path) & MAY_IMPORT.keys()
        upward = ours - MAY_IMPORT[package] - {package}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("package", MAY_IMPORT_OF_WORKER)
def test_a_part_of_the_worker_imports_only_what_stands_below_it(package: str) -> None:
    for path in modules_of(f"gpu_worker/{package}"):
        parts = [name.split(".") for name in imported_names(path)]
        ours = {names[1] for names in parts if names[0] == "gpu_worker" and len(names) > 1}
        upward = ours - MAY_IMPORT_OF_WORKER[package] - {package}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_no_test(package: str) -> None:
    for path in modules_of(package):
        assert not imported_packages(path) & {"tests", "conftest", "pytest"}, path


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_says_what_it_is_and_is_typed(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    docstring = ast.get_docstring(tree)
    assert docstring
    assert "TODO" not in docstring
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import forebay", {"torch", "numpy", "pydantic", "click", "redis", "tokenizers"}),
        (
            "import producer, producer.batch",
            {"torch", "numpy", "pydantic", "click", "transformers"},
        ),
        ("import forebay.cli", {"torch", "numpy", "redis", "tokenizers", "transformers"}),
        ("import scheduler.service", {"torch", "transformers"}),
        # What a batch run and a worker import before they start others, these wait for.
        ("import producer.batch", {"redis"}),
        ("import gpu_worker.service", {"torch", "numpy", "redis", "tokenizers", "transformers"}),
        ("import gpu_worker.serving", {"torch", "transformers", "gguf"}),
        ("import gpu_worker.rank", {"torch", "numpy", "pydantic", "redis", "tokenizers"}),
    ],
)
def test_importing_this_loads_nothing_heavy(statement: str, unwanted: set[str]) -> None:
    loaded = run_python(f"import sys; {statement}; print(*sys.modules)").split()
    assert not unwanted & set(loaded)


def test_importing_forebay_is_quick() -> None:
    # -X importtime tells what the import itself takes, whatever else the machine does meanwhile.
    best_us = min(import_time_us("forebay") for _ in range(3))
    assert best_us < 150_000


def import_time_us(module: str) -> int:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    line = next(line for line in done.stderr.splitlines() if line.endswith(f"| {module}"))
    return int(line.split("|")[1])


def run_python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
