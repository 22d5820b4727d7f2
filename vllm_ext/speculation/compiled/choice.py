# SPDX-License-Identifier: Apache-2.0
"""Choosing draft lengths, over requests and draft positions (`goodput`)."""

from __future__ import annotations

import math

import numpy as np

from vllm_ext.speculation.compiled.jit import compile_loop


@compile_loop
def value_drafts(survival: np.ndarray, usual: np.ndarray, share: float, weights: np.ndarray) -> np.ndarray:
    """What each draft adds to log(usual + share * (tokens - usual)) / share, times the request's weight: float64
    [n, k_max]. usual: float64 [n]; weights: float64 [n], or [0] for 1."""
    num_requests, k_max = survival.shape
    values = np.empty((num_requests, k_max))
    for row in range(num_requests):
        weight = weights[row] if len(weights) else 1.0
        average = usual[row] + share * (1.0 - usual[row])
        for place in range(k_max):
            more = share * survival[row, place]
            values[row, place] = weight * math.log1p(more / average) / share
            average += more
    return values


@compile_loop
def choose_lengths(
    survival: np.ndarray,
    values: np.ndarray,
    caps: np.ndarray,
    price: float,
    fixed: float,
    per_token: float,
    extra: np.ndarray,
) -> tuple[np.ndarray, float, float]:
    """(lengths int64 [n], expected tokens, milliseconds): the best prefix of every draft, exactly.

    values: `value_drafts`; caps: int64 [n], or [1] for all; price: of a millisecond; extra: float64 [k_max + 1], what a
    step takes more where that is its longest draft.
    """
    num_requests, k_max = survival.shape
    least = price * per_token
    # By position: what drafts there are worth, less their time.
    gains = np.zeros(k_max + 1)
    for row in range(num_requests):
        for place in range(min(k_max, caps[row if len(caps) > 1 else 0])):
            # They fall along a draft.
            if values[row, place] <= least:
                break
            gains[place + 1] += values[row, place] - least
    gained, best, longest = 0.0, 0.0, 0
    for place in range(1, k_max + 1):
        gained += gains[place]
        objective = gained - price * (extra[place] - extra[0])
        if objective > best:
            best, longest = objective, place
    lengths, tokens, count = np.zeros(num_requests, np.int64), float(num_requests), 0
    for row in range(num_requests):
        for place in range(min(longest, caps[row if len(caps) > 1 else 0])):
            if values[row, place] <= least:
                break
            lengths[row] += 1
            tokens += survival[row, place]
            count += 1
    return lengths, tokens, fixed + extra[longest] + per_token * count


@compile_loop
def choose_padded(
    survival: np.ndarray,
    values: np.ndarray,
    caps: np.ndarray,
    price: float,
    fixed: float,
    per_token: float,
    extra: np.ndarray,
    base_tokens: int,
    ladder: np.ndarray,
    padding: float,
) -> tuple[np.ndarray, float, float]:
    """As `choose_lengths` where forward passes are padded to the next size of `ladder`, int64, and a token that is only
    padding takes `padding` milliseconds.

    For each longest draft, the drafts worth most are taken in order of their worth, and every number of them is tried.
    """
    num_requests, k_max = survival.shape
    # A draft takes at least so long: what is worth less is never taken.
    least = price * max(per_token - padding, 0.0)
    best_time = _measure(0, fixed + extra[0], per_token, base_tokens, ladder, padding)
    best, best_count, best_longest, threshold = -price * best_time, 0, 0, 0.0
    worth = np.empty(num_requests * k_max)
    for longest in range(1, k_max + 1):
        # Where more positions take no more time, to choose from them is never worse.
        if longest < k_max and extra[longest] == extra[longest + 1]:
            continue
        found = 0
        for row in range(num_requests):
            for place in range(min(longest, caps[row if len(caps) > 1 else 0])):
                if values[row, place] <= least:
                    break
                worth[found] = values[row, place]
                found += 1
        order = np.sort(worth[:found])
        progress = 0.0
        for count in range(1, found + 1):
            value = order[found - count]
            progress += value
            time = _measure(count, fixed + extra[longest], per_token, base_tokens, ladder, padding)
            objective = progress - price * time
            if objective > best:
                best, best_count, best_longest, threshold, best_time = objective, count, longest, value, time
    lengths, tokens, left = np.zeros(num_requests, np.int64), float(num_requests), best_count
    # Of drafts worth the same, earlier positions.
    for place in range(best_longest):
        for row in range(num_requests):
            if place < caps[row if len(caps) > 1 else 0] and values[row, place] > threshold:
                lengths[row] += 1
                tokens += survival[row, place]
                left -= 1
    for place in range(best_longest):
        for row in range(num_requests):
            is_next = lengths[row] == place and place < caps[row if len(caps) > 1 else 0]
            if left and is_next and values[row, place] == threshold:
                lengths[row] += 1
                tokens += survival[row, place]
                left -= 1
    return lengths, tokens, best_time


@compile_loop
def _measure(
    drafts: int, fixed: float, per_token: float, base_tokens: int, ladder: np.ndarray, padding: float
) -> float:
    tokens = base_tokens + drafts
    place = np.searchsorted(ladder, tokens)
    padded = ladder[place] if place < len(ladder) else tokens
    return fixed + padding * (padded - base_tokens) + (per_token - padding) * drafts
