"""The README stays true: its settings, exit codes and commands are the code's, its examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import SecretStr

import forebay
from forebay.cli import cli
from producer.batch.fields import SUPPORTED
from service.exit_codes import ExitCode
from service.settings import ALL_SETTINGS, CommonSettings, variable
from wire import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def settings_table() -> str:
    """The table that belongs between the README's two settings comments."""
    readers: dict[str, list[str]] = {}
    for cls in ALL_SETTINGS:
        for name in cls.model_fields:
            readers.setdefault(name, []).append(cls.__name__.removesuffix("Settings").lower())
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for cls in ALL_SETTINGS:
        for name in cls.model_fields:
            if readers[name][0] != cls.__name__.removesuffix("Settings").lower():
                continue
            field = cls.model_fields[name]
            lines.append(
                f"| `{variable(name)}` | {shown_default(cls, name)} | {field.description} |"
            )
    return "\n".join(lines) + "\n"


def shown_default(cls: type[CommonSettings], name: str) -> str:
    field = cls.model_fields[name]
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    return "" if default is None else f"`{default}`"


def test_the_settings_table_is_the_settings() -> None:
    begin, end = "<!-- settings: begin -->\n", "<!-- settings: end -->"
    written = README[README.index(begin) + len(begin) : README.index(end)]
    assert written == settings_table()


def test_the_exit_codes_are_listed() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)}
    assert listed == {code.value for code in ExitCode}


def test_every_command_is_one_that_the_command_line_accepts() -> None:
    lines = [
        line.removeprefix("$ ")
        for block in code_blocks("console")
        for line in block.splitlines()
        if line.startswith("$ forebay ")
    ]
    assert len(lines) >= 5
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        assert isinstance(cli.commands[name].make_context(name, arguments), click.Context)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_errors_that_it_names_can_be_imported() -> None:
    [paragraph] = re.findall(r"Errors are types: (.*?)\.\n", README, re.DOTALL)
    named = re.findall(r"`(\w+)`", paragraph)
    assert len(named) >= 8
    assert all(issubclass(getattr(forebay, name), errors.ForebayError) for name in named)


def test_the_fields_of_a_body_are_those_that_are_taken() -> None:
    table = README[README.index("| part of a body |") : README.index("A field that is unknown")]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == set().union(*SUPPORTED.values())


@pytest.fixture
def up(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who runs `forebay up`."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "forebay", "up", "--model", "stub:"],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("Forebay is up" in line for line in process.stderr)
        try:
            yield environment
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_the_python_examples_run_as_they_stand(up: dict[str, str]) -> None:
    examples = code_blocks("python")
    assert len(examples) == 2
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            env=up,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip()


def test_the_first_example_takes_ten_lines() -> None:
    first = [line for line in code_blocks("python")[0].splitlines() if line.strip()]
    assert len(first) <= 10
