"""What is installed is what was declared, and the lock pins all of it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import forebay
from gpu_worker.__main__ import PACKAGES, command
from service.command import run_command

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "constraints.txt").read_text()


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[\[<>=~! ]", line, maxsplit=1)[0]) for line in requirements}


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == forebay.__version__
    assert f"forebay:{forebay.__version__}" in (ROOT / "compose.yaml").read_text()


def test_the_lock_pins_every_dependency_to_one_version() -> None:
    pins = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert len(names(pins)) == len(pins)
    declared = names(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        declared |= names(extra)
    assert declared <= names(pins)


def test_the_lock_names_no_place() -> None:
    assert "://" not in LOCK
    assert "@" not in LOCK


def test_producers_and_schedulers_install_without_torch() -> None:
    assert not names(PROJECT["dependencies"]) & {"torch", "numpy", "gguf", "safetensors"}


def test_every_package_is_declared_and_its_data_too() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    found = {pattern.rstrip("*") for pattern in tools["setuptools"]["packages"]["find"]["include"]}
    assert found == {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert tools["setuptools"]["package-data"]["wire"] == ["lua/*.lua"]
    assert list((ROOT / "wire" / "lua").glob("*.lua"))


def test_every_folder_of_a_package_is_a_package() -> None:
    for top in ROOT.glob("*/py.typed"):
        for module in top.parent.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_test_files_have_names_of_their_own_and_shadow_no_package() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    stems = [path.stem for path in files if path.name != "conftest.py"]
    assert len(set(stems)) == len(stems)
    assert not any(path.name == "__init__.py" for path in files)


def test_the_scripts_are_sound() -> None:
    for script, shell in ((".ci/run", "bash"), ("deploy/start-redis.sh", "sh")):
        subprocess.run([shell, "-n", ROOT / script], check=True)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_a_worker_without_its_engine_s_packages_says_which_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(PACKAGES) == names(PROJECT["optional-dependencies"]["worker"])
    monkeypatch.setattr("gpu_worker.__main__.find_spec", lambda name: None)
    assert run_command(command, ["--model", "stub:"]) == 2
    assert "a worker needs gguf, numpy, torch; install" in capsys.readouterr().err
