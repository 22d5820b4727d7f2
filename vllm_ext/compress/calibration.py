# SPDX-License-Identifier: Apache-2.0
"""Calibration text: read, tokenized with the model's own tokenizer, cut into windows, drawn with a seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vllm_ext.compress.windows import split_windows

#: Tokens of a window, and windows drawn from all sources together.
CONTEXT = 512
NUM_WINDOWS = 128

#: Instead of a file: tokens drawn uniformly from the vocabulary.
RANDOM = "random"


class CalibrationError(ValueError):
    """Calibration text that cannot be used; the message names the file, what was found, and the fix."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""

    def __len__(self) -> int:
        """Tokens of the vocabulary."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises CalibrationError where it has none that transformers can read."""
    from transformers import AutoTokenizer  # imported late: it takes seconds

    try:
        # Whole texts are encoded before they are cut, so the model's own limit would only cause a warning.
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, model_max_length=sys.maxsize)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{directory} has no usable tokenizer ({error}): copy its tokenizer files") from error
    # Where config.json names a known model and there are no tokenizer files, transformers makes an empty one.
    if not tokenizer.encode("text", add_special_tokens=False):
        raise CalibrationError(
            f"{directory} has no usable tokenizer (its vocabulary is empty): copy its tokenizer files"
        )
    return tokenizer


def read_documents(path: Path) -> list[str]:
    """The documents of a file: every line's "text" for *.jsonl, otherwise the whole file as one.

    Raises CalibrationError for a missing or undecodable file, a bad line, and a file without any text.
    """
    if not path.is_file():
        raise CalibrationError(f"text file {path} does not exist")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {path} is not UTF-8 text ({error}): convert it") from error
    documents = [content]
    if path.suffix == ".jsonl":
        documents = []
        # Not splitlines: JSON may hold U+2028 and its like as they are.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                documents.append(_read_line(line, f"{path}, line {number}"))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CalibrationError(f"text file {path} is empty: give a file with text")
    return documents


def make_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    context: int = CONTEXT,
    num_windows: int = NUM_WINDOWS,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Windows of calibration tokens, int64 [windows, context].

    sources: text files, *.jsonl files, or RANDOM. The documents of a file are joined by the tokenizer's end-of-text
    token and cut into consecutive windows; the same number of windows is drawn from every source, without
    repetition, all of them where a file has fewer. The same files and seed give the same windows.
    vocab_size: tokens that the model has embeddings of, where its tokenizer may know more; none past it is drawn.
    Raises CalibrationError for no source, for a file that is empty or shorter than one window, and for text with a
    token past vocab_size.
    """
    if not sources:
        raise CalibrationError(f"no calibration source: give a text file, a *.jsonl file, or {RANDOM!r}")
    if context < 1 or num_windows < len(sources):
        raise CalibrationError(f"{num_windows} windows of {context} tokens cannot come from {len(sources)} sources")
    known = len(tokenizer) if vocab_size is None else min(vocab_size, len(tokenizer))
    generator = np.random.default_rng(seed)
    parts = []
    for index, source in enumerate(sources):
        wanted = num_windows // len(sources) + (index < num_windows % len(sources))
        if str(source) == RANDOM:
            parts.append(generator.integers(0, known, (wanted, context), dtype=np.int64))
            continue
        windows = cut_windows(Path(source), tokenizer, context)
        drawn = windows[np.sort(generator.permutation(len(windows))[:wanted])]
        if vocab_size is not None and drawn.size and (largest := int(drawn.max())) >= vocab_size:
            raise CalibrationError(
                f"text file {source} has token {largest}, and the model has embeddings of {vocab_size}: its tokenizer "
                "is that of another model"
            )
        parts.append(drawn)
    return np.concatenate(parts)


def cut_windows(path: Path, tokenizer: Tokenizer, context: int) -> np.ndarray:
    """All consecutive windows of a file's tokens, int64 [windows, context]; see `make_windows`."""
    ids: list[int] = []
    for document in read_documents(path):
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer.encode(document, add_special_tokens=False)
    try:
        return split_windows(ids, context, name=f"text file {path}")
    except ValueError as error:
        raise CalibrationError(str(error)) from error


def _read_line(line: str, name: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{name} is not valid JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CalibrationError(f'{name} needs an object with a "text", got {line[:80]!r}')
    return record["text"]
