"""Cards and tokenizers: the same text gives the same tokens as transformers, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from gpu_worker.models.card import load_model_card
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_tokenizer import build_gguf_tokenizer
from support.model_files import hf_model_dir as make_hf_model_dir
from wire.errors import ModelError
from wire.messages import ModelCard

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "It's we're I'll they'd can't I'm you've DON'T",
    "In 2024, 1234567890 people paid $3.14159 for 0x1F.",
    "def f(x: int) -> str:\n    return f'{x!r}' # 100%\n",
    '<html><body class="a">&amp;</body></html>',
    "naïve café Ångström ﬁ ½ é é",
    "Привет, мир! 你好\uff0c世界。 こんにちは 안녕하세요 שלום مرحبا हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji ✈️",
    "\u0000\u0007\ufeff\u200b\ud7ff\U0010ffff",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|<|im_end|>|> <|endoftext|>x<|endoftext|>",
    "a" * 300,
    "١٢٣ \uff14\uff15\uff16 Ⅷ",
]


@pytest.fixture(scope="module")
def tokenizer(card: ModelCard) -> Tokenizer:
    return Tokenizer.from_buffer(card.tokenizer_json)


@pytest.fixture(scope="module")
def transformers_tokenizer(gguf_path: Path) -> Any:
    """The model's own tokenizer: digits one by one, then GPT-2's byte-level BPE."""
    fields = GGUFReader(gguf_path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"].contents()]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    with warnings.catch_warnings():
        # Deprecations inside transformers and what it imports are not ours to fix.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text_equal_those_of_transformers(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == transformers_tokenizer(text)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == transformers_tokenizer.decode(
            ids, skip_special_tokens=skip
        )


def test_the_real_models_card(card: ModelCard) -> None:
    assert card.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (card.bos_token, card.bos_token_id, card.add_bos_token) == ("<|im_start|>", 1, False)
    assert card.eos_token == "<|im_end|>"
    assert (card.vocab_size, card.max_model_len, card.block_size) == (49152, 8192, 16)
    assert card.chat_template is not None
    assert "<|im_start|>" in card.chat_template


def test_the_directory_gives_the_same_card_as_the_file(card: ModelCard) -> None:
    from_directory = load_model_card(
        make_hf_model_dir(), name=card.name, block_size=16, max_model_len=None
    )
    assert from_directory == card


def test_name_and_context_can_be_chosen(gguf_path: Path) -> None:
    card = load_model_card(gguf_path, name="mine", block_size=8, max_model_len=100)
    assert (card.name, card.block_size, card.max_model_len) == ("mine", 8, 100)
    with pytest.raises(ModelError, match="1 to 8192 tokens"):
        load_model_card(gguf_path, name=None, block_size=16, max_model_len=9000)


def test_a_card_loads_without_torch_and_within_a_second(gguf_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; "
        "from gpu_worker.models.card import load_model_card; started = time.process_time(); "
        f"load_model_card(Path({str(gguf_path)!r}), name=None, block_size=16, max_model_len=None); "
        "print(time.process_time() - started, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, has_torch = run.stdout.split()
    assert has_torch == "False"
    assert float(seconds) < 1.0


LLAMA3_TEXT = "It's 1234567 o'clock,  isn't IT?\r\n\n  ok"
ALL_BYTES = [
    chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
]


def write_vocabulary(
    path: Path, pre: str, *, kind: str = "gpt2", merges: tuple[str, ...] = ("1 2",), **fields: bool
) -> GGUFFile:
    """A GGUF file of nothing but a byte vocabulary, one merged token, "<s>" and "<tool>"."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*ALL_BYTES, "12", "<s>", "<tool>"])
    writer.add_token_types([1] * (len(ALL_BYTES) + 1) + [3, 4])
    writer.add_token_merges(list(merges))
    for name, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["It", "'s", "Ġ1234567"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "6", "7"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "456", "7"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "6", "7"]),
    ],
)
def test_each_family_splits_numbers_its_own_way(
    tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    tokenizer = build_gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf", pre))
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234567")]
    assert found == pieces
    assert tokenizer.decode(tokenizer.encode(LLAMA3_TEXT).ids) == LLAMA3_TEXT


def test_control_tokens_are_hidden_and_user_defined_ones_shown(tmp_path: Path) -> None:
    tokenizer = build_gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf", "qwen2"))
    ids = tokenizer.encode("<s>a<tool>b").ids
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a<tool>b"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"pre": "smollm", "kind": "llama"}, "tokenizer model 'llama' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"pre": "qwen2", "merges": ("12",)}, "merge '12' is not a pair"),
        ({"pre": "qwen2", "merges": ("12 nowhere",)}, "out of vocabulary; damaged file"),
    ],
)
def test_an_unknown_tokenizer_is_named(
    tmp_path: Path, arguments: dict[str, Any], complaint: str
) -> None:
    file = write_vocabulary(tmp_path / "v.gguf", **arguments)
    with pytest.raises(ModelError, match=complaint):
        build_gguf_tokenizer(file)


@pytest.fixture
def write_directory(tmp_path: Path, hf_model_dir: Path) -> Callable[..., Path]:
    """The real model's directory without weights, its tokenizer changed as asked."""

    def write(change: Callable[[Tokenizer], object], **config: object) -> Path:
        (tmp_path / "config.json").write_text((hf_model_dir / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(hf_model_dir / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def card_of(directory: Path) -> ModelCard:
    return load_model_card(directory, name=None, block_size=16, max_model_len=None)


def test_a_tokenizer_that_prepends_bos_becomes_a_flag(write_directory: Callable[..., Path]) -> None:
    def prepend_bos(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        tokenizer.enable_truncation(4)

    bos = {"content": "<|im_start|>", "lstrip": False}
    card = card_of(write_directory(prepend_bos, bos_token=bos))
    assert (card.bos_token, card.bos_token_id, card.add_bos_token) == ("<|im_start|>", 1, True)
    encoded = Tokenizer.from_buffer(card.tokenizer_json).encode("one two three four five six")
    assert encoded.ids[0] != 1
    assert len(encoded.ids) > 4


def test_chat_templates_come_from_a_file_a_field_or_a_list(
    write_directory: Callable[..., Path],
) -> None:
    def unchanged(tokenizer: Tokenizer) -> None:
        return None

    assert card_of(write_directory(unchanged)).chat_template is None
    assert card_of(write_directory(unchanged, chat_template="field")).chat_template == "field"
    named = [{"name": []}, {"name": "tool_use", "template": "t"}]
    assert card_of(write_directory(unchanged, chat_template=named)).chat_template is None
    named = [*named, {"name": "default", "template": "d"}]
    directory = write_directory(unchanged, chat_template=named)
    assert card_of(directory).chat_template == "d"
    (directory / "chat_template.jinja").write_text("file")
    assert card_of(directory).chat_template == "file"


def test_a_missing_or_damaged_tokenizer_is_named(write_directory: Callable[..., Path]) -> None:
    directory = write_directory(lambda tokenizer: None)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        card_of(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        card_of(directory)
