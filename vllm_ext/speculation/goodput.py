# SPDX-License-Identifier: Apache-2.0
"""The draft lengths with the most expected tokens per millisecond.

    goodput(k) = sum_i weight_i * (1 + sum_{j <= k_i} survival[i, j])  /  time(k)
    time(k)    = fixed + per_token * sum_i k_i + per_pass * max_i k_i

survival[i, j], the chance that the first j drafts of request i are all accepted, falls along j, so taking every draft
worth more than a price takes a prefix of each request's draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: The ratio below converges in three or four rounds; more would mean numbers that do not compare.
MAX_ROUNDS = 30


class DraftCost(NamedTuple):
    """Milliseconds of a step: without drafts, for each draft, and for each pass of a drafter that makes one draft a
    pass for all requests (0 for drafters whose drafts cost the same at any length)."""

    fixed: float
    per_token: float
    per_pass: float = 0.0


class Choice(NamedTuple):
    """lengths int64 [n]; expected tokens of the step (weights applied), its milliseconds, and their ratio."""

    lengths: np.ndarray
    tokens: float
    milliseconds: float

    @property
    def goodput(self) -> float:
        """Expected tokens per millisecond."""
        return self.tokens / self.milliseconds


def choose_lengths(
    survival: np.ndarray, caps: np.ndarray, cost: DraftCost, weights: np.ndarray | None = None
) -> Choice:
    """The best length for every request, exactly.

    survival: float64 [n, k_max], falling along k_max. caps: int [n], the longest draft of each request. weights:
    float64 [n], what a token of each request is worth; None for 1.
    Raises ValueError for a fixed cost that is not positive, or negative costs.

    Source: SmartSpec (arXiv:2406.14066, section 4) tries every length for the whole batch until goodput falls. Here
    lengths differ, which makes the same maximum a linear fractional program: Dinkelbach's iteration prices a
    millisecond at the best goodput known, takes the drafts that are worth their price for the best number of passes,
    and prices again with what that earns.
    """
    if not cost.fixed > 0 or cost.per_token < 0 or cost.per_pass < 0:
        raise ValueError(f"times must be positive, got {cost}")
    num_requests, k_max = survival.shape
    value = survival if weights is None else survival * weights[:, None]
    value = np.where(np.arange(k_max) < caps[:, None], value, 0.0)
    base = float(num_requests if weights is None else weights.sum())
    tokens, time = base, cost.fixed
    lengths = np.zeros(num_requests, np.int64)
    for _ in range(MAX_ROUNDS):
        price = tokens / time
        # What each pass earns above its price, for every number of passes.
        profit = np.maximum(value - price * cost.per_token, 0.0).sum(axis=0) - price * cost.per_pass
        totals = np.cumsum(profit)
        passes = int(totals.argmax()) + 1
        if totals[passes - 1] <= 1e-12 * base:
            break
        taken = value[:, :passes] > price * cost.per_token
        lengths = taken.sum(axis=1)
        tokens = base + float(value[:, :passes][taken].sum())
        passes_used = int(lengths.max())
        time = cost.fixed + cost.per_token * int(lengths.sum()) + cost.per_pass * passes_used
        if tokens / time <= price * (1 + 1e-12):
            break
    return Choice(lengths, tokens, time)


def choose_padded(
    survival: np.ndarray,
    caps: np.ndarray,
    cost: DraftCost,
    padding: float,
    base_tokens: int,
    sizes: Sequence[int],
    weights: np.ndarray | None = None,
) -> Choice:
    """The best lengths where a forward pass costs as much as the next of `sizes` tokens, as captured CUDA graphs do.

    Arguments as `choose_lengths`; cost.fixed is that of `base_tokens`, without padding; padding: milliseconds of a
    token that is only padding. Every number of drafts, the most likely accepted ones, is tried with every number of
    passes.
    Batches beyond the largest size are not padded.
    """
    value = survival if weights is None else survival * weights[:, None]
    value = np.where(np.arange(value.shape[1]) < caps[:, None], value, 0.0)
    base = float(len(survival) if weights is None else weights.sum())
    ladder = np.array(sorted(sizes), np.int64)
    if not len(ladder) or ladder[-1] < base_tokens:
        return choose_lengths(survival, caps, cost, weights)
    best: Choice | None = None
    for passes in range(value.shape[1] + 1):
        order = np.sort(value[:, :passes], axis=None)[::-1]
        gained = np.concatenate([[0.0], np.cumsum(order[order > 0])])
        drafts = np.arange(len(gained))
        tokens = base_tokens + drafts
        steps = np.minimum(np.searchsorted(ladder, tokens), len(ladder) - 1)
        padded = np.maximum(ladder[steps], tokens)
        times = cost.fixed + padding * (padded - base_tokens) + (cost.per_token - padding) * drafts
        times += cost.per_pass * passes
        count = int(((base + gained) / times).argmax())
        time = float(times[count])
        if best is None or (base + gained[count]) / time > best.goodput:
            taken = np.zeros(value.shape, bool)
            if count:
                # Of equal drafts the earlier positions: a stable order of what is above and at the last one taken.
                flat = np.argsort(-value[:, :passes], axis=None, kind="stable")[:count]
                taken[np.unravel_index(flat, (len(value), passes))] = True
            best = Choice(taken.sum(axis=1), base + float(gained[count]), time)
    assert best is not None
    return best


def choose_uniform(
    survival: np.ndarray,
    lengths: Sequence[int],
    costs: Sequence[float],
    weights: np.ndarray | None = None,
) -> Choice:
    """The best one length for all requests, out of a few: what CUDA graphs of whole decode steps are captured for.

    survival as in `choose_lengths`; costs: milliseconds of a step at each length. Raises ValueError where `lengths`
    and `costs` do not pair, or a length exceeds what survival knows.
    """
    if len(lengths) != len(costs) or not lengths or max(lengths) > survival.shape[1]:
        raise ValueError(f"lengths {list(lengths)} do not fit {len(costs)} costs and k_max {survival.shape[1]}")
    value = survival if weights is None else survival * weights[:, None]
    base = float(len(survival) if weights is None else weights.sum())
    gained = np.concatenate([[0.0], np.cumsum(value.sum(axis=0))])
    best = max(range(len(lengths)), key=lambda index: (base + gained[lengths[index]]) / costs[index])
    chosen = np.full(len(survival), lengths[best], np.int64)
    return Choice(chosen, float(base + gained[lengths[best]]), float(costs[best]))
