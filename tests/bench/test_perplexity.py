# SPDX-License-Identifier: Apache-2.0
"""Windows and errors of the perplexity measurement. Its numbers are tested with the engine."""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.quality.perplexity import load_tokenizer, measure_perplexity, split_windows


class Letters:
    """One token per character."""

    bos_token_id: int | None = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


class WithoutBos(Letters):
    bos_token_id: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives token t the probability 1/t, and its answers in reverse order, as the protocol allows."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "letters":
            self.send_error(404, explain=f"no model {body['model']}")
            return
        choices = [
            {"index": i, "prompt_logprobs": [None, *({str(t): {"logprob": -math.log(t)}} for t in prompt[1:])]}
            for i, prompt in enumerate(body["prompt"])
        ]
        answer = json.dumps({"choices": choices[::-1]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@given(
    text=st.text(st.characters(min_codepoint=65, max_codepoint=90), min_size=1, max_size=60),
    context=st.integers(2, 9),
    windows=st.none() | st.integers(1, 12),
    add_bos=st.booleans(),
)
def test_windows_are_full_consecutive_and_never_overlap(
    text: str, context: int, windows: int | None, add_bos: bool
) -> None:
    step = context - add_bos
    available = len(text) // step
    if available == 0:
        with pytest.raises(ValueError, match=f"the text has {len(text)} tokens"):
            split_windows(text, Letters(), context, windows, add_bos)
        return
    split = split_windows(text, Letters(), context, windows, add_bos)
    assert len(split) == min(available, windows or available)
    assert all(len(window) == context for window in split)
    assert not add_bos or all(window[0] == 1 for window in split)
    scored = [token for window in split for token in window[int(add_bos) :]]
    assert "".join(map(chr, scored)) == text[: len(scored)]


def test_every_token_but_the_first_of_a_window_is_scored(url: str) -> None:
    # 10 windows are more than one request. Two of three letters of a window count, each with probability 1/t.
    text = "ABCXYZ" * 5
    result = measure_perplexity(url, "letters", text, Letters(), context=3)
    scored = [ord(letter) for letter in "BCYZ" * 5]
    assert (result.tokens, result.windows) == (20, 10)
    assert result.perplexity == pytest.approx(math.prod(scored) ** (1 / 20))
    with_bos = measure_perplexity(url, "letters", text, Letters(), context=3, windows=1, add_bos=True)
    assert with_bos.tokens == 2
    assert with_bos.perplexity == pytest.approx(math.sqrt(ord("A") * ord("B")))


def test_a_refusal_shows_the_servers_words(url: str) -> None:
    with pytest.raises(RuntimeError, match=r"/v1/completions answered 404(?s:.)*no model digits"):
        measure_perplexity(url, "digits", "ABCD", Letters(), context=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "at least 2 tokens.*got 1"),
        ({"context": 2, "windows": 0}, "windows must be at least 1, got 0"),
        ({"context": 2, "add_bos": True}, "a bos token; this one has none"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_perplexity("http://unused", "letters", "ABCD", WithoutBos(), **options)


def test_shipped_tokenizer(tiny_moe: str) -> None:
    tokenizer = load_tokenizer(tiny_moe)
    assert tokenizer.bos_token_id == 1
    text = (Path(tiny_moe) / "kjv_val.txt").read_text()
    assert len(tokenizer.encode(text, add_special_tokens=False)) // 512 == 136
