# SPDX-License-Identifier: Apache-2.0
"""Perplexity's arithmetic, for every way of getting log probabilities: windows of tokens, and the mean over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def check_scoring(context: int, windows: int | None) -> None:
    """Raises ValueError for windows that have no token to score, and for no window."""
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, one given and one scored; got {context}")
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")


def split_windows(
    ids: Sequence[int],
    context: int,
    *,
    windows: int | None = None,
    prefix: Sequence[int] = (),
    name: str = "the text",
) -> np.ndarray:
    """The first `windows` (None: all) full windows of a token sequence, consecutive and not overlapping.

    Returns int64 [windows, context]. Each starts with the tokens of `prefix`, and the sequence advances by
    `context - len(prefix)`. name: of the text, for the message. Raises ValueError for less than one full window.
    Source: the fixed-length perplexity of Transformers' documentation, with a stride of one window.
    """
    step = context - len(prefix)
    count = len(ids) // step
    if count == 0:
        raise ValueError(
            f"{name} has {len(ids)} tokens, less than one window of {context}: give a longer text or a smaller context"
        )
    count = count if windows is None else min(windows, count)
    cut = np.asarray(ids[: count * step], dtype=np.int64).reshape(count, step)
    return np.concatenate([np.tile(np.asarray(prefix, dtype=np.int64), (count, 1)), cut], axis=1)


def compute_perplexity(logprobs: Iterable[float]) -> tuple[float, int]:
    """(exp of the mean negative natural log probability, number of tokens).

    Raises ValueError where no token is scored, and where the mean is NaN or infinite: no model with sound weights
    gives a token the probability 0.
    """
    total, tokens = 0.0, 0
    for logprob in logprobs:
        total -= logprob
        tokens += 1
    if tokens == 0:
        raise ValueError("perplexity needs at least one scored token")
    if not math.isfinite(total):
        raise ValueError(
            f"the log probabilities of {tokens} tokens add up to {-total}: the model's weights are damaged"
        )
    return math.exp(total / tokens), tokens
