"""What the model tests share: the real model's files and the reference, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.models.card import load_model_card
from support import model_files
from support.greedy_reference import load_reference
from wire.messages import ModelCard

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rivers.",
    "Add 17 and 25, then double the result.",
    "List three uses of baking soda.",
    "def fibonacci(n):\n    # complete this function\n",
    "Translate to German: Good morning, my friend!",
    "Why is the sky blue? Explain it to a child.",
    "Summarize: " + "The old mill by the stream ground corn for the whole valley. " * 12,
    "Name the planets.",
    "What does HTTP status 404 mean?",
    "Give me a synonym for 'happy'.",
    "¿Cuál es la capital de España?",
    "Count from 1 to 20.",
    "Who wrote Hamlet, and when? " + "Please be brief and exact. " * 20,
    "Explain recursion with an example in Python.",
    "🙂",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread would spin while it waits, at the expense of whatever runs beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    return model_files.gguf_path()


@pytest.fixture(scope="session")
def hf_model_dir() -> Path:
    return model_files.hf_model_dir()


@pytest.fixture(scope="session")
def card(gguf_path: Path) -> ModelCard:
    return load_model_card(gguf_path, name=None, block_size=16, max_model_len=None)


@pytest.fixture(scope="session")
def prompts(card: ModelCard) -> list[list[int]]:
    """16 chat prompts of 30 to 200 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
    texts = [
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for question in _QUESTIONS
    ]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="session")
def reference(hf_model_dir: Path) -> Any:
    """The real model in transformers, in float32."""
    return load_reference(hf_model_dir)
