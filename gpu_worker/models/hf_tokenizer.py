"""The tokenizer, special tokens and chat template of a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gpu_worker.models.files import read_json_object, read_text
from wire.errors import ModelError


@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """What a directory says of its tokenizer. `tokenizer` adds no special tokens by itself."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    adds_bos: bool
    chat_template: str | None


def read_hf_tokenizer(directory: Path) -> HFTokenizer:
    """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises ModelError, naming the file, if one is damaged or tokenizer.json is missing.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; save the model's fast tokenizer into the directory "
            "(save_pretrained of transformers' AutoTokenizer does)"
        )
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelError(f"{path} is damaged ({error}); download it again") from error

    config_path = directory / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    bos_token = _token_text(config, "bos_token", config_path)
    adds_bos = _adds_bos(tokenizer, bos_token)
    # From here on the flag alone says whether a BOS is prepended: were the tokenizer to add one
    # too, a caller that asks for special tokens would get two.
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return HFTokenizer(
        tokenizer=tokenizer,
        bos_token=bos_token,
        eos_token=_token_text(config, "eos_token", config_path),
        adds_bos=adds_bos,
        chat_template=_chat_template(directory, config, config_path),
    )


def _adds_bos(tokenizer: Tokenizer, bos_token: str | None) -> bool:
    """Whether the tokenizer's post-processor puts the BOS in front: tried, since flags lie."""
    if bos_token is None:
        return False
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == tokenizer.token_to_id(bos_token)


def _token_text(config: dict[str, object], name: str, path: Path) -> str | None:
    """A special token, which is written as a string or as an object with `content`."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path}: field {name} is {value!r:.80}; it must be a string")
    return value


def _chat_template(directory: Path, config: dict[str, object], path: Path) -> str | None:
    """A file of its own goes before the field; of several named templates, "default" is taken."""
    template_path = directory / "chat_template.jinja"
    if template_path.is_file():
        return read_text(template_path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path}: field chat_template must be a string")
    return template
