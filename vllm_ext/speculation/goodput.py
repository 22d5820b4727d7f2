# SPDX-License-Identifier: Apache-2.0
"""The draft lengths with which requests are done soonest.

    maximize  sum_i weight_i * log(tokens_i(k_i))  -  sum_i weight_i * log(time(k))
    tokens_i(k) = 1 + sum_{j <= k} survival[i, j]
    time(k)     = fixed + per_token * sum_i k_i + per_pass * passes(max_i k_i) + once * [any k_i > 0]

survival[i, j], the chance that the first j drafts of request i are all accepted, falls along j, so taking every draft
worth more than a price takes a prefix of each request's draft.

Why logarithms: SmartSpec maximizes the tokens of this step over its time. Where a batch has requests whose drafts
pass and others whose drafts do not, that gives the time to the former; they finish, and the batch fills with the
latter. A request of L tokens takes L / tokens_i steps, so what a share of progress is worth is the same for every
request: of all steady ways to work through a queue, the one above serves the most tokens per second (the condition
is d tokens_i / tokens_i = d time / time). It is proportional fairness (Kelly 1997). Where requests are alike it is the
same as tokens over time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

#: Stands for weights of 1, and for no sizes.
_NO_WEIGHTS, _NO_SIZES = np.zeros(0), np.zeros(0, np.int64)


@functools.cache
def load_compiled() -> ModuleType:
    """`vllm_ext.speculation.compiled`, which must not be imported before a worker is made."""
    return importlib.import_module("vllm_ext.speculation.compiled")


class DraftCost(NamedTuple):
    """Milliseconds of a step: without drafts or drafting, for each draft, for each forward pass of the drafter, and for
    any drafts at all."""

    fixed: float
    per_token: float
    per_pass: float = 0.0
    once: float = 0.0


class Choice(NamedTuple):
    """lengths int64 [n]; expected tokens of the step, its milliseconds, and their ratio."""

    lengths: np.ndarray
    tokens: float
    milliseconds: float

    @property
    def goodput(self) -> float:
        """Expected tokens per millisecond of this step."""
        return self.tokens / self.milliseconds


def value_drafts(survival: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """What each draft adds to the objective's first sum, float64 [n, k_max]: the same for any costs and caps.

    survival, weights: as in `choose_lengths`. Values fall along k_max, so the best drafts are prefixes.
    """
    values: np.ndarray = load_compiled().value_drafts(
        _order(survival), _NO_WEIGHTS if weights is None else _order(weights)
    )
    return values


def choose_lengths(
    survival: np.ndarray,
    caps: np.ndarray | int,
    cost: DraftCost,
    weights: np.ndarray | None = None,
    values: np.ndarray | None = None,
    passes: Sequence[int] | None = None,
) -> Choice:
    """The best length for every request, exactly.

    survival: float64 [n, k_max], falling along k_max. caps: int [n], the longest draft of each request, or one for all.
    weights: float64 [n], what progress of each request is worth; None for 1. values: `value_drafts` of both, where the
    caller has them. passes: int [k_max + 1], forward passes of the drafter by the longest draft, not falling; None for
    one for each position.
    Raises ValueError for a fixed cost that is not positive, or negative costs.

    Source: SmartSpec (arXiv:2406.14066, section 4) tries every length for the whole batch until tokens over time fall.
    Here lengths differ: for each longest draft, the drafts worth most are taken in order of their worth, and every
    number of them is tried.
    """
    return _choose(survival, caps, cost, weights, values, passes, 0, _NO_SIZES, 0.0)


def choose_padded(
    survival: np.ndarray,
    caps: np.ndarray | int,
    cost: DraftCost,
    padding: float,
    base_tokens: int,
    sizes: Sequence[int],
    weights: np.ndarray | None = None,
    values: np.ndarray | None = None,
    passes: Sequence[int] | None = None,
) -> Choice:
    """The best lengths where a forward pass costs as much as the next of `sizes` tokens, as captured CUDA graphs do.

    Arguments as `choose_lengths`; cost.fixed is that of `base_tokens`, without padding; padding: milliseconds of a
    token that is only padding. Batches beyond the largest size are not padded.
    """
    ladder = np.array(sorted(sizes), np.int64)
    if not len(ladder) or ladder[-1] < base_tokens:
        return choose_lengths(survival, caps, cost, weights, values, passes)
    return _choose(survival, caps, cost, weights, values, passes, base_tokens, ladder, padding)


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
    total = float(len(survival) if weights is None else weights.sum())
    made = 1.0 + np.cumsum(survival, axis=1)
    progress = np.log(made) if weights is None else np.log(made) * weights[:, None]
    gained = np.concatenate([[0.0], progress.sum(axis=0)])
    best = max(range(len(lengths)), key=lambda index: gained[lengths[index]] - total * np.log(costs[index]))
    length = lengths[best]
    tokens = float(made[:, length - 1].sum()) if length else float(len(survival))
    return Choice(np.full(len(survival), length, np.int64), tokens, float(costs[best]))


def _choose(
    survival: np.ndarray,
    caps: np.ndarray | int,
    cost: DraftCost,
    weights: np.ndarray | None,
    values: np.ndarray | None,
    passes: Sequence[int] | None,
    base_tokens: int,
    ladder: np.ndarray,
    padding: float,
) -> Choice:
    fixed, per_token, per_pass, once = cost
    if not fixed > 0 or min(per_token, per_pass, once) < 0:
        raise ValueError(f"times must be positive, got {cost}")
    num_requests, k_max = survival.shape
    total = float(num_requests if weights is None else np.add.reduce(weights))
    if values is None:
        values = value_drafts(survival, weights)
    extra = np.arange(k_max + 1.0) if passes is None else np.array(passes, np.float64)
    extra *= per_pass
    extra[1:] += once
    limits = np.array([caps], np.int64) if isinstance(caps, int) else np.ascontiguousarray(caps, np.int64)
    return Choice(
        *load_compiled().choose_lengths(
            _order(survival), values, limits, total, float(fixed), float(per_token), extra, base_tokens, ladder, padding
        )
    )


def _order(values: np.ndarray) -> np.ndarray:
    """As the loops are compiled for."""
    return np.ascontiguousarray(values, np.float64)
