# SPDX-License-Identifier: Apache-2.0
"""Slices of the shipped texts, cut to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

TEXTS = Path(__file__).parent.parent / "models" / "tiny_moe"
#: Cutting between two tokens can split one anew; so often a text is cut once more.
MAX_CUTS = 8


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""


class Corpus:
    """A text as the tokens of one tokenizer. Raises ValueError for a text without tokens."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.token_ids = tokenizer.encode(text, add_special_tokens=False)
        if not self.token_ids:
            raise ValueError("the text of a corpus has no tokens")

    def slice(self, generator: np.random.Generator, tokens: int) -> str:
        """A random passage of `tokens` tokens; past the end it goes on at the start."""
        start = int(generator.integers(len(self.token_ids)))
        repeats = (start + tokens) // len(self.token_ids) + 1
        chosen = (self.token_ids * repeats)[start : start + tokens]
        return self.fit(self.tokenizer.decode(chosen), tokens)

    def fit(self, text: str, tokens: int) -> str:
        """The beginning of `text` that has at most `tokens` tokens, as near as cutting at tokens allows."""
        return fit_tokens(text, self.tokenizer, tokens)

    def count(self, text: str) -> int:
        """Tokens of a text, without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def fit_tokens(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The beginning of `text` with at most `tokens` tokens. Raises ValueError when no cut gives that."""
    limit = tokens
    for _ in range(MAX_CUTS):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(token_ids) <= tokens:
            return text
        # A cut inside a character decodes to the replacement character, which would be many tokens.
        text = tokenizer.decode(token_ids[:limit]).rstrip("\N{REPLACEMENT CHARACTER}")
        limit -= 1
    raise ValueError(f"this tokenizer gives no beginning of the text with at most {tokens} tokens")


def load_corpus(name: str, tokenizer: Tokenizer) -> Corpus:
    """The held-out text `kjv` (prose) or `py` (source code) that ships with the small model."""
    path = TEXTS / f"{name}_val.txt"
    if not path.is_file():
        names = ", ".join(sorted(file.name.removesuffix("_val.txt") for file in TEXTS.glob("*_val.txt")))
        raise ValueError(f"no text {name!r}; there are: {names}")
    return Corpus(path.read_text(encoding="utf-8"), tokenizer)
