# SPDX-License-Identifier: Apache-2.0
"""The loops of smartspec over requests and draft positions, compiled: every step of the engine waits for them.

A step asks for all of them once or twice. Each NumPy call of a step takes several times as long between two forward
passes, when the processor's caches hold something else, as in a loop of its own, and there were dozens of them. The
functions are compiled by numba, which vLLM brings.

Imported where a model of acceptance is made, in the scheduler: vLLM's CPU workers fail at their start where numba is
there already (scheduling/trie_proposer.py), and schedulers are made after workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit  # type: ignore[import-untyped]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compile(function: _Function) -> _Function:
    """Compiled at the first call, which takes seconds, and kept beside this file or in the user's cache folder."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        # Neither folder can be written to.
        return njit(function)


@_compile
def learn_outcomes(
    counts: np.ndarray,
    shared_counts: np.ndarray,
    usual: np.ndarray,
    slots: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    made: np.ndarray,
    usual_rate: float,
    request_memory: float,
    idle_memory: float,
    shared_memory: float,
    untried_memory: float,
) -> bool:
    """Add one step's outcomes to the discounted counts and to the tokens of usual steps, in place; whether any first
    draft was tried.

    counts: float64 [slots, k_max, 2], successes and trials; shared_counts: float64 [k_max, 2]; usual: float64 [slots];
    slots, drafted, accepted, made: int64 [n].
    """
    num_requests, k_max = len(slots), counts.shape[1]
    successes, trials = np.zeros(k_max), np.zeros(k_max)
    for row in range(num_requests):
        given, right = drafted[row], accepted[row]
        # Censored: nothing is known of what is behind the first failure.
        tried = min(right + 1, given)
        memory = request_memory if given > 0 else idle_memory
        usual[slots[row]] += usual_rate * (made[row] - usual[slots[row]])
        known = counts[slots[row]]
        for place in range(k_max):
            known[place, 0] *= memory
            known[place, 1] *= memory
        for place in range(tried):
            known[place, 1] += 1.0
            trials[place] += 1.0
        for place in range(right):
            known[place, 0] += 1.0
            successes[place] += 1.0
    for place in range(k_max):
        # What is known of a position that nobody tried fades slowly: it is tried again some time.
        memory = shared_memory if trials[place] > 0 else untried_memory
        shared_counts[place, 0] = shared_counts[place, 0] * memory + successes[place] / num_requests
        shared_counts[place, 1] = shared_counts[place, 1] * memory + trials[place] / num_requests
    return trials[0] > 0


@_compile
def pool_counts(shared_counts: np.ndarray, initial: float, strength: float) -> tuple[np.ndarray, float]:
    """Chances of an average request: at each position, float64 [k_max], and over all positions."""
    successes, trials = 0.0, 0.0
    for place in range(len(shared_counts)):
        successes += shared_counts[place, 0]
        trials += shared_counts[place, 1]
    pooled = (successes + initial) / (trials + 1.0)
    shared = np.empty(len(shared_counts))
    for place in range(len(shared_counts)):
        shared[place] = (shared_counts[place, 0] + strength * pooled) / (shared_counts[place, 1] + strength)
    return shared, pooled


@_compile
def predict_survival(
    counts: np.ndarray,
    slots: np.ndarray,
    shared: np.ndarray,
    pooled: float,
    strength: float,
    lowest: float,
    highest: float,
) -> np.ndarray:
    """P(the first j drafts are all accepted): float64 [n, k_max].

    shared, pooled: `pool_counts`; strength: trials that they count for in one request; lowest, highest: bounds of the
    chance at one position.
    """
    k_max = counts.shape[1]
    survival = np.empty((len(slots), k_max))
    for row in range(len(slots)):
        known = counts[slots[row]]
        succeeded, expected = 0.0, 0.0
        for place in range(k_max):
            succeeded += known[place, 0]
            expected += shared[place] * known[place, 1]
        # What a request does over all its positions, against what all requests do at the same positions.
        factor = (succeeded + strength * pooled) / (expected + strength * pooled)
        alive = 1.0
        for place in range(k_max):
            guess = min(shared[place] * factor, highest)
            hazard = (guess * strength + known[place, 0]) / (known[place, 1] + strength)
            alive *= min(max(hazard, lowest), highest)
            survival[row, place] = alive
    return survival


@_compile
def sum_first_drafts(survival: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> tuple[int, float, float, int]:
    """(how many first drafts were tried, sum of their chances, of these squared, how many were accepted)."""
    count, total, squares, passed = 0, 0.0, 0.0, 0
    for row in range(len(drafted)):
        if drafted[row] > 0:
            chance = survival[row, 0]
            count += 1
            total += chance
            squares += chance * chance
            passed += accepted[row] > 0
    return count, total, squares, passed


@_compile
def measure_spread(counts: np.ndarray, slots: np.ndarray, shared: np.ndarray, memory: float, least: float) -> float:
    """Variance of requests' chances beyond what luck accounts for, by the method of moments; NaN where no request has
    more trials than `least`. memory: what a count keeps at each later observation."""
    total_surplus, enough = 0.0, 0
    for row in range(len(slots)):
        known = counts[slots[row]]
        succeeded, expected, trials, squares = 0.0, 0.0, 0.0, 0.0
        for place in range(counts.shape[1]):
            tried = known[place, 1]
            succeeded += known[place, 0]
            expected += shared[place] * tried
            trials += tried
            squares += tried * tried
        if trials <= least:
            continue
        chance = expected / trials
        # Weights m^0 .. m^(t-1) add up to w and their squares to w (2 - (1 - m) w) / (1 + m).
        squares = (2 * trials - (1 - memory) * squares) / (1 + memory)
        noise = chance * (1 - chance) * squares / (trials * trials)
        total_surplus += (succeeded / trials - chance) ** 2 - noise
        enough += 1
    return total_surplus / enough if enough else math.nan


@_compile
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


@_compile
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


@_compile
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


@_compile
def _measure(
    drafts: int, fixed: float, per_token: float, base_tokens: int, ladder: np.ndarray, padding: float
) -> float:
    tokens = base_tokens + drafts
    place = np.searchsorted(ladder, tokens)
    padded = ladder[place] if place < len(ladder) else tokens
    return fixed + padding * (padded - base_tokens) + (per_token - padding) * drafts
