"""Telling what a model is and what it is called; reading its small files with clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from wire.errors import ModelError

MAX_JSON_BYTES = 256 * 2**20
"""Above the largest tokenizer.json in use (33 MB) by far; a bound on what we read into memory."""


def model_kind(path: Path) -> Literal["gguf", "huggingface"]:
    """Tell a GGUF file from a Hugging Face directory. Raises ModelError for anything else."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json; give a Hugging Face model directory or a .gguf file"
            )
        return "huggingface"
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a model directory or a .gguf file")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a model directory nor a .gguf file")
    return "gguf"


def default_model_name(model_path: Path) -> str:
    """What a model is called unless it is given a name: as its directory, or its file."""
    return model_path.resolve().name if model_path.is_dir() else model_path.stem


def read_text(path: Path) -> str:
    """The file's text, as UTF-8."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                f"{path} is larger than {MAX_JSON_BYTES} bytes; it is not what it says"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; the model directory is incomplete") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text; the file is damaged") from error


def read_json_object(path: Path) -> dict[str, object]:
    """The file's content, which must be one JSON object."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise ModelError(f"{path} is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; the file is damaged")
    return value
