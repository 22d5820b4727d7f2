# SPDX-License-Identifier: Apache-2.0
"""Calibration windows: files of both kinds, seeds, shares of the sources, and bad files by message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_ext.compress.calibration import RANDOM, CalibrationError, load_tokenizer, make_windows, read_documents


class Characters:
    """A tokenizer of one token per character; 0 ends a text."""

    eos_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def __len__(self) -> int:
        return 128


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    return path


def test_windows_are_pieces_of_the_text_drawn_by_seed(text: Path) -> None:
    windows = make_windows([text], Characters(), seed=1, context=10, num_windows=7)
    assert windows.dtype == np.int64
    assert windows.shape == (7, 10)
    content = text.read_text()
    starts = [content[i * 10 : (i + 1) * 10] for i in range(100)]
    assert all("".join(map(chr, window)) in starts for window in windows)
    assert np.array_equal(windows, make_windows([text], Characters(), seed=1, context=10, num_windows=7))
    assert not np.array_equal(windows, make_windows([text], Characters(), seed=2, context=10, num_windows=7))


def test_a_short_file_gives_all_it_has(text: Path) -> None:
    windows = make_windows([text], Characters(), context=300, num_windows=50)
    assert windows.shape == (3, 300)
    assert "".join(map(chr, windows.reshape(-1))) == text.read_text()[:900]


def test_sources_share_the_windows(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Z" * 2000)
    windows = make_windows([text, other], Characters(), context=10, num_windows=9)
    assert [(window == ord("Z")).all() for window in windows] == [False] * 5 + [True] * 4


def test_jsonl_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """JSON strings may hold other characters that end a line for `str.splitlines`."""
    path, texts = tmp_path / "lines.jsonl", ["a\u2028b \x85 c\x1c", "second"]
    for newline in ("\n", "\r\n"):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        path.write_bytes((newline.join(lines) + newline).encode())
        assert read_documents(path) == texts


def test_jsonl_documents_are_separated(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 3, "other": 1}) for letter in "ab") + "\n\n")
    assert read_documents(path) == ["aaa", "bbb"]
    windows = make_windows([path], Characters(), context=7, num_windows=1)
    assert windows.tolist() == [[97, 97, 97, 0, 98, 98, 98]]


def test_random_tokens_by_seed() -> None:
    windows = make_windows([RANDOM], Characters(), seed=3, context=50, num_windows=4)
    assert windows.shape == (4, 50)
    assert windows.min() >= 0
    assert windows.max() < 128
    assert np.array_equal(windows, make_windows([RANDOM], Characters(), seed=3, context=50, num_windows=4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty: give a file with text"),
        ("a.txt", b" \n ", r"a\.txt is empty"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl is empty"),
        ("a.txt", b"short", r"a\.txt has 5 tokens, less than one window of 10: give a longer text"),
        ("a.txt", b"\xff\xfe\xff", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r'a\.jsonl, line 2 needs an object with a "text"'),
        ("a.jsonl", b"[1]\n", "line 1 needs an object"),
        ("a.jsonl", b"{\n", "line 1 is not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        make_windows([tmp_path / name], Characters(), context=10, num_windows=2)


def test_bad_arguments(tmp_path: Path, text: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt does not exist"):
        make_windows([tmp_path / "nowhere.txt"], Characters())
    with pytest.raises(CalibrationError, match="no calibration source"):
        make_windows([], Characters())
    with pytest.raises(CalibrationError, match="1 windows of 512 tokens cannot come from 2 sources"):
        make_windows([text, text], Characters(), num_windows=1)
    with pytest.raises(CalibrationError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_the_shipped_model(tiny_moe: str) -> None:
    tokenizer = load_tokenizer(Path(tiny_moe))
    windows = make_windows([Path(tiny_moe) / "kjv_val.txt"], tokenizer, context=64, num_windows=3)
    assert windows.shape == (3, 64)
    assert windows.max() < len(tokenizer) == 4096


def test_no_token_past_the_models_vocabulary(text: Path) -> None:
    windows = make_windows([RANDOM], Characters(), context=50, num_windows=40, vocab_size=30)
    assert (windows.min(), windows.max()) == (0, 29)
    # A vocabulary that is padded past the tokenizer's changes nothing.
    plain = make_windows([RANDOM], Characters(), context=50, num_windows=4)
    assert np.array_equal(plain, make_windows([RANDOM], Characters(), context=50, num_windows=4, vocab_size=500))
    with pytest.raises(CalibrationError, match=r"text.txt has token 122, and the model has embeddings of 100"):
        make_windows([text], Characters(), context=50, num_windows=20, vocab_size=100)
