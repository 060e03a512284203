"""The command line: an example in every help, one line for every error, the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import forebay
from forebay.cli import cli, main
from service.exit_codes import ExitCode, exit_code
from wire.errors import (
    ConfigError,
    FileError,
    ForebayError,
    IntakeFull,
    ModelError,
    RequestFailed,
    ServerUnreachable,
)

NOBODY = "redis://:hunter2@127.0.0.1:1/0"
ROW = (
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions", '
    '"body": {"prompt": "Hello", "max_tokens": 1}}\n'
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(ROW)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"forebay {forebay.__version__}\n", "")


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_every_help_shows_an_example(capsys: pytest.CaptureFixture[str], name: str | None) -> None:
    code, out, err = run(capsys, *([name] if name else []), "--help")
    assert (code, err) == (0, "")
    _, _, example = out.partition("Example:")
    assert example.split()[0] == "forebay"
    if name:
        assert example.split()[1] == name


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.startswith("Usage: ")
    assert "Commands:\n" in err
    assert "\n  run-batch " in err


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_explained(name: str) -> None:
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"forebay {name} {parameter.opts[0]}"


@pytest.mark.parametrize("module", ["scheduler", "gpu_worker", "forebay"])
def test_services_run_as_modules_too(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    assert "Example:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["worker"], 2, "--model is missing"),
        (["worker", "--model", "m", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["worker", "--modle", "m"], 2, "No such option '--modle'"),
        (["scheduler", "--max-batch-tokens", "0"], 2, "--max-batch-tokens is '0'"),
        (["scheduler", "--redis", NOBODY], 4, "127.0.0.1:1"),
        (["submit", "Hello", "--redis", NOBODY], 4, "127.0.0.1:1"),
        (["submit", "Hello", "--redis", "http://127.0.0.1"], 2, "redis://"),
        (["submit", " ", "--redis", NOBODY], 1, "empty"),
        (["submit", "Hello", "--temperature", "-1", "--redis", NOBODY], 1, "temperature is -1"),
        (["submit", "Hello", "--state-dir", "/nonexistent"], 4, "no `forebay up` is running"),
        (["status", "--redis", NOBODY], 4, "127.0.0.1:1"),
        (["up", "--model", "missing.gguf", "--state-dir", "STATE"], 3, "missing.gguf: no such"),
        (["run-batch", "-o", "OUT", "--model", "m"], 2, "Missing option '-i'"),
        (["run-batch", "-i", "IN", "-o", "OUT"], 2, "--model is missing"),
        (["run-batch", "-i", "IN", "-o", "OUT", "--model", "m.gguf"], 3, "m.gguf: no such file"),
        (["run-batch", "-i", "nothing.jsonl", "-o", "OUT", "--model", "m"], 3, "nothing.jsonl"),
        (["run-batch", "-i", "IN", "-o", "/nowhere/out", "--model", "m"], 3, "/nowhere/out"),
        (["run-batch", "-i", "IN", "-o", "IN", "--model", "m"], 2, "is the input"),
        (["run-batch", "-i", "IN", "-o", "OUT", "--redis", NOBODY], 4, "127.0.0.1:1"),
        (["run-batch", "-i", "IN", "-o", "OUT", "--restart", "--retry-failed"], 2, "give one"),
        (["run-batch", "-i", "IN", "-o", "-", "--retry-failed"], 2, "standard output cannot be"),
        (["run-batch", "-i", "IN", "-o", "OTHER", "--model", "m"], 3, "line 1 of"),
        (
            ["run-batch", "-i", "IN", "-o", "OUT", "--redis", NOBODY, "--block-size", "8"],
            2,
            "--block-size is for workers",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    prompts: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "notes.txt").write_text("not an output\n")
    names = {"OUT": "out.jsonl", "OTHER": "notes.txt", "STATE": "state"}
    places = {"IN": prompts, **{place: tmp_path / name for place, name in names.items()}}
    given, out, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    last_line = err.splitlines()[-1]
    assert given == code, err
    assert out == ""
    assert last_line.startswith("error: ")
    assert message in last_line
    assert "Traceback" not in err
    assert "hunter2" not in err


def test_an_unknown_variable_stops_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_MODLE", "m.gguf")
    code, _, err = run(capsys, "worker", "--model", "m.gguf")
    assert code == 2
    assert "FOREBAY_MODLE is not a setting of Forebay; did you mean FOREBAY_MODEL?" in err


def test_an_engine_flag_on_the_command_line_beats_a_server_in_the_environment(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prompts: Path,
) -> None:
    monkeypatch.setenv("FOREBAY_REDIS_URL", NOBODY)
    batch = ["run-batch", "-i", prompts, "-o", tmp_path / "out.jsonl"]
    assert run(capsys, *batch)[0] == ExitCode.PIPELINE_DOWN
    assert run(capsys, *batch, "--model", "missing.gguf")[0] == ExitCode.UNUSABLE_FILE


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [("null", ExitCode.OK, "0 failed"), ('{"code": "x"}', ExitCode.REQUESTS_FAILED, "1 of them")],
)
def test_a_batch_run_that_has_ended_needs_neither_server_nor_model(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    prompts: Path,
    error: str,
    code: ExitCode,
    outcome: str,
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(f'{{"id": "", "custom_id": "a", "response": {{}}, "error": {error}}}\n')
    batch = ["run-batch", "-i", prompts, "-o", output]
    for flags in (["--redis", NOBODY], ["--model", "missing.gguf"]):
        given, out, err = run(capsys, *batch, *flags)
        assert (given, out) == (code, "")
        assert "resumed: 1 row was done already" in err
        assert "requests  1: 1 done before" in err
        assert outcome in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestFailed("no", reason="x"), 1),
        (IntakeFull("no", retry_after_s=1.0), 1),
        (ConfigError("no"), 2),
        (ModelError("no"), 3),
        (ServerUnreachable("no"), 4),
        (ForebayError("no"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_exit_code_tells_the_kind_of_error(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_an_error_about_a_file_is_told_from_one_about_a_setting() -> None:
    assert exit_code(FileError("cannot write")) == ExitCode.UNUSABLE_FILE
    assert exit_code(ConfigError("no such flag")) == ExitCode.USAGE


def test_the_help_and_the_code_list_the_same_exit_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, help_text, _ = run(capsys, "--help")
    for code in ExitCode:
        assert f"\n    {code.value:<5}" in help_text
