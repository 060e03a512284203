"""Real text for measuring perplexity, on any machine: what comes with Python, or the user's own."""

from __future__ import annotations

import argparse
import random
import statistics
import tarfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from tokenizers import Tokenizer

_MODULES: tuple[ModuleType, ...] = (argparse, random, statistics, tarfile)


def windows(
    tokenizer: Tokenizer, path: Path | None, *, num_tokens: int, window: int
) -> list[list[int]]:
    """About `num_tokens` tokens in pieces of `window`, spread evenly over the text.

    The text is that of the file at `path`, or else Python's own: three parts of its language
    reference, one of source code. Another version of Python has another text.
    """
    if path is not None:
        return _spread(tokenizer, [path.read_text()], num_tokens // window, window)
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    sources = [Path(str(module.__file__)).read_text() for module in _MODULES]
    num_windows = num_tokens // window
    num_of_code = num_windows // 4
    return [
        *_spread(tokenizer, [reference], num_windows - num_of_code, window),
        *_spread(tokenizer, sources, num_of_code, window),
    ]


def _spread(
    tokenizer: Tokenizer, texts: Sequence[str], num_windows: int, window: int
) -> list[list[int]]:
    pieces = [
        ids[start : start + window]
        for ids in (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        for start in range(0, len(ids) - window + 1, window)
    ]
    taken = min(num_windows, len(pieces))
    return [pieces[i * len(pieces) // taken] for i in range(taken)]
