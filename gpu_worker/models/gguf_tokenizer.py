"""Rebuilding a byte-level BPE tokenizer from the vocabulary, merges and names in a GGUF file.

GGUF names its pre-tokenizer instead of describing it; the descriptions are those of the models
that the names stand for, as their own tokenizer.json files give them.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from gpu_worker.models.fields import Fields
from gpu_worker.models.gguf_file import GGUFFile
from wire.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4
"""Token types: control tokens are dropped from decoded text, user-defined ones are not."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Contractions, words, numbers (the hole is how many digits at a time), punctuation, spaces."""


def build_gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer in `file`. It adds no special tokens by itself.

    Raises ModelError for another kind than byte-level BPE, an unknown pre-tokenizer, or damaged
    fields.
    """
    fields = Fields(file.metadata, str(file.path), prefix="tokenizer.ggml.")
    kind = fields.text("model")
    if kind != "gpt2":
        raise ModelError(
            f"{file.path}: tokenizer model {kind!r} is not supported, only byte-level BPE "
            "('gpt2'); use the model's Hugging Face directory with its tokenizer.json"
        )
    pre = fields.text("pre", "default")
    tokens = _strings(fields, "tokens")
    vocabulary, merges = _vocabulary(tokens, file), _merges(fields, file)
    try:
        bpe = BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelError(f"{file.path}: {error}; damaged file") from error
    tokenizer = Tokenizer(bpe)
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, file)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, tokens, fields)
    return tokenizer


def adds_bos(file: GGUFFile) -> bool:
    """Whether the model expects its beginning-of-sequence token before every prompt.

    Files that do not say so follow their family: Llama 3 does, the others do not.
    """
    fields = Fields(file.metadata, str(file.path), prefix="tokenizer.ggml.")
    return fields.flag("add_bos_token", fields.text("pre", "default") in _LLAMA3)


def token_text(file: GGUFFile, name: str) -> tuple[int | None, str | None]:
    """Id and text of the token that metadata field `name` points to; Nones if it is not set."""
    fields = Fields(file.metadata, str(file.path), prefix="tokenizer.ggml.")
    if not fields.has(name):
        return None, None
    token_id, tokens = fields.integer(name), _strings(fields, "tokens")
    if not 0 <= token_id < len(tokens):
        raise ModelError(f"{file.path}: {name} {token_id} is outside the vocabulary; damaged file")
    return token_id, tokens[token_id]


def _strings(fields: Fields, name: str) -> list[str]:
    value = fields.values.get(fields.prefix + name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelError(f"{fields.origin}: field {fields.prefix}{name} is missing or damaged")
    return value


def _vocabulary(tokens: list[str], file: GGUFFile) -> dict[str, int]:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{file.path}: the vocabulary names a token twice; damaged file")
    return vocabulary


def _merges(fields: Fields, file: GGUFFile) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(fields, "merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ModelError(f"{file.path}: merge {merge!r} is not a pair; damaged file")
        merges.append((left, right))
    return merges


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], fields: Fields) -> None:
    types = fields.integers("token_type")
    if len(types) not in (0, len(tokens)):
        raise ModelError(f"{fields.origin}: token_type and tokens differ in length; damaged file")
    of_type = {
        wanted: [token for token, kind in zip(tokens, types, strict=False) if kind == wanted]
        for wanted in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in of_type[_CONTROL]]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type[_USER_DEFINED]])


def _pre_tokenizer(pre: str, file: GGUFFile) -> pre_tokenizers.PreTokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; "
            f"{', '.join(sorted(_PRE_TOKENIZERS))} are; "
            "use the model's Hugging Face directory with its tokenizer.json"
        )
    return _PRE_TOKENIZERS[pre]()


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3"})
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen"})
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _single_digits_then_gpt2,
    **dict.fromkeys(_LLAMA3, lambda: _words("{1,3}")),
    **dict.fromkeys(_QWEN2, lambda: _words("")),
}
