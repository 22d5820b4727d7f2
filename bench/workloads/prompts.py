# SPDX-License-Identifier: Apache-2.0
"""Streams of text prompts: chat-like, chat among long prompts, RAG-like, repetitive, code, long context.

Every generator takes (numpy generator, tokenizer, number of requests) and its options, and returns `Request`s whose
prompt and output fit `max_model_len` tokens together. Token counts are those of the prompt's text, without special
tokens or a chat template.
"""

from __future__ import annotations

import numpy as np

from bench.workloads.corpus import Corpus, Tokenizer, fit_tokens, load_corpus
from bench.workloads.lengths import (
    CHAT_OUTPUT,
    CHAT_PROMPT,
    CODE_OUTPUT,
    CODE_PROMPT,
    RAG_OUTPUT,
    RAG_PROMPT,
    draw_lengths,
)
from bench.workloads.requests import Request

#: Room for the tokens that a server adds (bos, a chat template), which are not counted here.
RESERVED_TOKENS = 8
RAG_INSTRUCTION = "Answer the question from the passages below.\n\n"
RAG_PASSAGE_TOKENS = 200
NEEDLE_QUESTION = "\nThe pass key of {name} is"
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "junco", "kelp", "larch")


def make_chat(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 4096,
    output_tokens: int | None = None,
    scale: float = 1.0,
) -> list[Request]:
    """Prose of chat-like lengths (`lengths.CHAT_PROMPT`, `CHAT_OUTPUT`)."""
    corpus = load_corpus("kjv", tokenizer)
    lengths = draw_lengths(
        generator, (CHAT_PROMPT, CHAT_OUTPUT), num_requests, max_model_len - RESERVED_TOKENS, output_tokens, scale
    )
    return [Request(corpus.slice(generator, prompt), output) for prompt, output in lengths]


def make_mixed(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 4096,
    output_tokens: int | None = None,
    scale: float = 1.0,
    long_share: float = 0.25,
    long_tokens: int | None = None,
    long_output_tokens: int = 16,
) -> list[Request]:
    """Chat (`make_chat`), and among it prompts of about `long_tokens` tokens with short answers.

    What makes the two phases of a server disturb each other: somebody's long prompt stands between others' tokens. Of
    all requests `long_share`, rounded, are long, wherever they fall, so that every run has as many; their lengths lie
    evenly within a fourth of `long_tokens`, which defaults to half of the context.
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"long_share must be between 0 and 1, got {long_share}")
    middle = max_model_len // 2 if long_tokens is None else long_tokens
    longest = middle + middle // 4
    _check_fit(longest, long_output_tokens, max_model_len)
    num_long = round(num_requests * long_share)
    requests = make_chat(
        generator,
        tokenizer,
        num_requests - num_long,
        max_model_len=max_model_len,
        output_tokens=output_tokens,
        scale=scale,
    )
    corpus = load_corpus("kjv", tokenizer)
    for length in generator.integers(middle - middle // 4, longest, size=num_long, endpoint=True):
        requests.append(Request(corpus.slice(generator, max(1, int(length))), long_output_tokens))
    return [requests[place] for place in generator.permutation(num_requests)]


def make_rag(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 8192,
    output_tokens: int | None = None,
    scale: float = 1.0,
    num_passages: int = 64,
    skew: float = 1.0,
) -> list[Request]:
    """One instruction, then passages from a shared pool, then a question; long in and short out.

    Passages are drawn by Zipf's law with exponent `skew` (0: evenly), so prompts share parts, seldom at the same place.
    """
    if num_passages < 1 or skew < 0:
        raise ValueError(f"num_passages must be at least 1 and skew at least 0, got {num_passages} and {skew}")
    corpus = load_corpus("kjv", tokenizer)
    head = corpus.count(RAG_INSTRUCTION)
    lengths = draw_lengths(
        generator,
        (RAG_PROMPT, RAG_OUTPUT),
        num_requests,
        max_model_len - RESERVED_TOKENS,
        output_tokens,
        scale,
        min_prompt=head + 32,
    )
    pool = [corpus.slice(generator, RAG_PASSAGE_TOKENS) for _ in range(num_passages)]
    weights = 1 / np.arange(1, num_passages + 1) ** skew
    requests = []
    for prompt, output in lengths:
        question = "\n\nQuestion: " + corpus.slice(generator, 16)
        room = prompt - corpus.count(question) - head
        chosen = generator.choice(num_passages, size=room // RAG_PASSAGE_TOKENS + 1, p=weights / weights.sum())
        passages = "\n\n".join(f"[{place}] {pool[index]}" for place, index in enumerate(chosen, start=1))
        requests.append(Request(RAG_INSTRUCTION + corpus.fit(passages, max(1, room)) + question, output))
    return requests


def make_repetitive(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 2048,
    prompt_tokens: int = 256,
    output_tokens: int = 128,
    period: int = 24,
) -> list[Request]:
    """A passage of `period` tokens again and again, every time with the next number before it.

    What a drafter that copies from the prompt is good at; the opposite end from `make_chat`.
    """
    _check_fit(prompt_tokens, output_tokens, max_model_len)
    if not 1 <= period <= prompt_tokens:
        raise ValueError(f"period must be 1 to prompt_tokens ({prompt_tokens}), got {period}")
    corpus = load_corpus("kjv", tokenizer)
    requests = []
    for _ in range(num_requests):
        passage = corpus.slice(generator, period).strip()
        lines = (f"{number}. {passage}\n" for number in range(1, prompt_tokens // period + 2))
        requests.append(Request(corpus.fit("".join(lines), prompt_tokens), output_tokens))
    return requests


def make_code(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 4096,
    output_tokens: int | None = None,
    scale: float = 1.0,
) -> list[Request]:
    """Python source from the start of a line, to be continued for a few lines."""
    corpus = load_corpus("py", tokenizer)
    lengths = draw_lengths(
        generator, (CODE_PROMPT, CODE_OUTPUT), num_requests, max_model_len - RESERVED_TOKENS, output_tokens, scale
    )
    return [Request(_slice_lines(corpus, generator, prompt), output) for prompt, output in lengths]


def make_long_context(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 32768,
    prompt_tokens: int | None = None,
    output_tokens: int = 16,
) -> list[Request]:
    """A pass key hidden at a random depth of a long text, and the question for it.

    The answer and the depth (0 to 1) are written beside the prompt. `prompt_tokens` defaults to all that
    `max_model_len` leaves. The single-needle task of RULER (arXiv:2404.06654) in prose of the shipped text.
    """
    length = max_model_len - output_tokens - RESERVED_TOKENS if prompt_tokens is None else prompt_tokens
    _check_fit(length, output_tokens, max_model_len)
    corpus = load_corpus("kjv", tokenizer)
    requests = []
    for _ in range(num_requests):
        name = "-".join(generator.choice(WORDS, size=2))
        key = str(generator.integers(100_000, 1_000_000))
        needle = f"\nThe pass key of {name} is {key}.\n"
        question = NEEDLE_QUESTION.format(name=name)
        room = length - corpus.count(needle) - corpus.count(question)
        if room < 2:
            raise ValueError(f"{length} prompt tokens leave no text around the pass key; give {length - room + 2}")
        depth = float(generator.random())
        before = min(room - 1, max(1, int(room * depth)))
        text = corpus.slice(generator, before) + needle + corpus.slice(generator, room - before)
        # Joints can be worth a token more or less; the question must not be what is cut.
        text = fit_tokens(text, tokenizer, length - corpus.count(question))
        requests.append(Request(text + question, output_tokens, {"answer": key, "depth": round(depth, 4)}))
    return requests


def _slice_lines(corpus: Corpus, generator: np.random.Generator, tokens: int) -> str:
    # A few tokens more, since the first line is dropped up to its end.
    text = corpus.slice(generator, tokens + 64)
    _, newline, rest = text.partition("\n")
    return corpus.fit(rest if newline and rest.strip() else text, tokens)


def _check_fit(prompt_tokens: int, output_tokens: int, max_model_len: int) -> None:
    if prompt_tokens < 1 or output_tokens < 1 or prompt_tokens + output_tokens + RESERVED_TOKENS > max_model_len:
        raise ValueError(
            f"a prompt of {prompt_tokens} and an output of {output_tokens} tokens, with {RESERVED_TOKENS} in reserve, "
            f"do not fit max_model_len {max_model_len}"
        )
