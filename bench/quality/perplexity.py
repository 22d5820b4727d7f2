# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of a running server, from the `prompt_logprobs` of `/v1/completions`.

python -m bench.quality.perplexity --url http://127.0.0.1:8000 --tokenizer MODEL_DIR --text FILE [--windows N]
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_ext.compress import windows as windowing

#: Windows sent in one request; the server schedules them as it would those of as many clients.
WINDOWS_PER_REQUEST = 8
REQUEST_TIMEOUT_SECONDS = 300.0

# A proxy from the environment must not see requests to loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token before a text; None where the model has none."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood (nats) over `tokens` predicted tokens of `windows` windows."""

    perplexity: float
    tokens: int
    windows: int


def measure_perplexity(
    base_url: str,
    model: str,
    text: str,
    tokenizer: Tokenizer,
    context: int = 512,
    windows: int | None = None,
    add_bos: bool = False,
) -> Perplexity:
    """Perplexity of the server's model on a text, in consecutive windows that do not overlap.

    Each window has `context` tokens, the first of which is given and not scored; `windows` limits their number (None:
    all full windows of the text). With `add_bos` the first token of each window is the tokenizer's bos token and the
    text advances by `context - 1`. Without it, which is how the shipped model's card measures, a window
    starts inside a document as its training slices did; its perplexity with bos is about 2 % higher.

    `base_url` is the server's address without `/v1`. Raises ValueError for a text shorter than one window or a
    tokenizer without bos, RuntimeError with the server's message when it refuses a request.
    """
    split = split_windows(text, tokenizer, context, windows, add_bos)
    requests = (split[start : start + WINDOWS_PER_REQUEST] for start in range(0, len(split), WINDOWS_PER_REQUEST))
    logprobs = (logprob for request in requests for logprob in request_logprobs(base_url, model, request))
    return Perplexity(*windowing.compute_perplexity(logprobs), len(split))


def split_windows(text: str, tokenizer: Tokenizer, context: int, windows: int | None, add_bos: bool) -> list[list[int]]:
    """The first `windows` full windows of a text as token ids, `context` each. Raises ValueError as above."""
    windowing.check_scoring(context, windows)
    prefix: list[int] = []
    if add_bos:
        if tokenizer.bos_token_id is None:
            raise ValueError("add_bos needs a tokenizer with a bos token; this one has none")
        prefix = [tokenizer.bos_token_id]
    ids = tokenizer.encode(text, add_special_tokens=False)
    return windowing.split_windows(ids, context, windows=windows, prefix=prefix).tolist()


def request_logprobs(base_url: str, model: str, prompts: Sequence[Sequence[int]]) -> Iterator[float]:
    """Natural log probability of every prompt token but each prompt's first, prompt after prompt.

    Raises RuntimeError when the server refuses, or answers without a probability for a token.
    """
    body = {
        "model": model,
        "prompt": [list(prompt) for prompt in prompts],
        "max_tokens": 1,
        "temperature": 0,
        # 0: only the prompt's own tokens, none of the alternatives.
        "prompt_logprobs": 0,
    }
    answer = post_json(f"{base_url}/v1/completions", body)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for prompt, choice in zip(prompts, choices, strict=True):
        positions = choice["prompt_logprobs"]
        if positions is None or len(positions) != len(prompt):
            found = "none" if positions is None else len(positions)
            raise RuntimeError(f"asked for the log probabilities of {len(prompt)} tokens, the server sent {found}")
        for token, position in zip(prompt[1:], positions[1:], strict=True):
            yield position[str(token)]["logprob"]


def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a POST. Raises RuntimeError with the server's own message on an HTTP error."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=REQUEST_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        message = error.read().decode(errors="replace")
        raise RuntimeError(f"{url} answered {error.code}: {message[:2000]}") from error


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model directory or name, through transformers."""
    from transformers import AutoTokenizer  # imported late: it takes seconds

    # Whole texts are encoded before they are cut, so the model's own limit would only cause a warning.
    return AutoTokenizer.from_pretrained(str(model), model_max_length=sys.maxsize)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a server that already runs; prints one JSON object."""
    parser = argparse.ArgumentParser(description="Held-out perplexity of a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server address, without /v1")
    parser.add_argument("--model", help="served model name; default: the only one that the server has")
    parser.add_argument("--tokenizer", required=True, help="model directory or name to take the tokenizer from")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="measure only the first N windows")
    parser.add_argument("--add-bos", action="store_true", help="start every window with the bos token")
    options = parser.parse_args(argv)
    model = options.model
    try:
        if model is None:
            with _opener.open(f"{options.url}/v1/models", timeout=10) as response:
                model = json.load(response)["data"][0]["id"]
        result = measure_perplexity(
            options.url,
            model,
            options.text.read_text(encoding="utf-8"),
            load_tokenizer(options.tokenizer),
            options.context,
            options.windows,
            options.add_bos,
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"model": model, "context": options.context, **asdict(result)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
