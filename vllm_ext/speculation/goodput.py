# SPDX-License-Identifier: Apache-2.0
"""The draft lengths with which requests are done soonest.

    maximize  sum_i value_i(k_i)  -  price * time(k)
    value_i(k) = weight_i * log(usual_i + share * (tokens_i(k) - usual_i)) / share
    price      = sum_i weight_i / usual milliseconds of a step
    tokens_i(k) = 1 + sum_{j <= k} survival[i, j]
    time(k)     = fixed + per_token * sum_i k_i + per_pass * passes(max_i k_i) + once * [any k_i > 0]

survival[i, j], the chance that the first j drafts of request i are all accepted, falls along j, so taking every draft
worth more than a price takes a prefix of each request's draft. usual_i are the tokens that a step of request i makes on
average; share is the part of that average that comes from the steps which have these lengths.

Why not tokens over time: SmartSpec maximizes those of this step. Where a batch has requests whose drafts pass and
others whose drafts do not, that gives the time to the former; they finish, and the batch fills with the latter. A
request of L tokens takes L / tokens_i steps, so what a share of progress is worth is the same for every request: of all
steady ways to work through a queue, the one with the largest

    sum_i weight_i * log(tokens_i)  -  sum_i weight_i * log(time)      of averages over many steps

serves the most tokens per second: proportional fairness (Kelly 1997). One step moves the averages a little, and that
sum by its gradient, survival over usual tokens less price times time; choosing each step by the gradient leads to the
best averages (Stolyar 2005, for wireless networks). A plan that stands for several steps moves them further: share is
how far, and without it such plans swing between too many drafts and none. share = 1 would be the logarithm of one step
alone, which takes a burst for less than it is: a lookup that finds something at one place of ten should draft long
there. Where requests are alike and steps are too, all of these are tokens over time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

#: Stands for weights of 1.
_NO_WEIGHTS = np.zeros(0)


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
    """lengths int64 [n]; expected tokens of the step and its milliseconds."""

    lengths: np.ndarray
    tokens: float
    milliseconds: float


def value_drafts(
    survival: np.ndarray, usual: np.ndarray, share: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """What each draft is expected to add to its request's progress, float64 [n, k_max], in usual steps.

    survival: float64 [n, k_max], falling along k_max. usual: float64 [n], tokens that a step of each request makes on
    average, at least 1. share: above 0, at most 1: of that average, from steps with these drafts. weights: float64 [n],
    what progress of each request is worth; None for 1. Raises ValueError for another share.
    Values fall along k_max, so the best drafts are prefixes.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of steps in an average must be above 0 and at most 1, got {share}")
    values: np.ndarray = load_compiled().value_drafts(
        _order(survival), _order(usual), float(share), _NO_WEIGHTS if weights is None else _order(weights)
    )
    return values


def choose_lengths(
    survival: np.ndarray,
    values: np.ndarray,
    caps: np.ndarray | int,
    cost: DraftCost,
    price: float,
    passes: Sequence[int] | None = None,
) -> Choice:
    """The best length for every request, exactly.

    survival: float64 [n, k_max], falling along k_max; values: `value_drafts` of it. caps: int [n], the longest draft of
    each request, or one for all. price: what a millisecond is worth, in the unit of values. passes: int [k_max + 1],
    forward passes of the drafter by the longest draft, not falling; None for one for each position.
    Raises ValueError for a fixed cost that is not positive, for negative costs and a negative price.

    Source: SmartSpec (arXiv:2406.14066, section 4) tries every length for the whole batch until tokens over time fall.
    Here lengths differ: for each longest draft, every draft up to it is taken that is worth more than its time.
    """
    extra, limits = _prepare(survival, caps, cost, price, passes)
    fixed, per_token, _, _ = cost
    return Choice(
        *load_compiled().choose_lengths(
            _order(survival), _order(values), limits, float(price), float(fixed), float(per_token), extra
        )
    )


def choose_again(
    chances: tuple[object, ...],
    usual: np.ndarray,
    caps: np.ndarray,
    cost: DraftCost,
    price: float,
    share: float,
    weights: np.ndarray | None = None,
    multiple: int = 1,
) -> np.ndarray:
    """`choose_lengths` of what a model of acceptance believes now, int64 [n]: one call, and nothing is checked.

    chances: `AcceptanceModel.describe`; usual: float64 [slots], `AcceptanceModel.usual`; caps: int64 [n]; cost: of
    drafts that are made, as `choose_lengths` was given before; share, weights: as `value_drafts`; multiple: as
    `drop_least`, of a step with a token for each request.
    """
    lengths: np.ndarray = load_compiled().choose_again(
        *chances,
        usual,
        share,
        _NO_WEIGHTS if weights is None else _order(weights),
        caps,
        price,
        cost.per_token,
        cost.once,
        multiple,
    )
    return lengths


def drop_least(lengths: np.ndarray, values: np.ndarray, base_tokens: int, multiple: int) -> None:
    """Shorten drafts, those worth least first, until the tokens of a step are a multiple; in place. Where that would be
    more than a part of them nothing is changed.

    lengths: int64 [n]; values: float64 [n, k_max], `value_drafts`; base_tokens: of the step without drafts.
    """
    load_compiled().drop_least(lengths, _order(values), base_tokens, multiple)


def choose_padded(
    survival: np.ndarray,
    values: np.ndarray,
    caps: np.ndarray | int,
    cost: DraftCost,
    price: float,
    padding: float,
    base_tokens: int,
    sizes: Sequence[int],
    passes: Sequence[int] | None = None,
) -> Choice:
    """The best lengths where a forward pass costs as much as the next of `sizes` tokens, as captured CUDA graphs do.

    Arguments as `choose_lengths`; cost.fixed is that of `base_tokens`, without padding; padding: milliseconds of a
    token that is only padding. Batches beyond the largest size are not padded.
    """
    ladder = np.array(sorted(sizes), np.int64)
    if not len(ladder) or ladder[-1] < base_tokens:
        return choose_lengths(survival, values, caps, cost, price, passes)
    extra, limits = _prepare(survival, caps, cost, price, passes)
    fixed, per_token, _, _ = cost
    return Choice(
        *load_compiled().choose_padded(
            _order(survival),
            _order(values),
            limits,
            float(price),
            float(fixed),
            float(per_token),
            extra,
            base_tokens,
            ladder,
            float(padding),
        )
    )


def choose_uniform(
    survival: np.ndarray, values: np.ndarray, lengths: Sequence[int], costs: Sequence[float], price: float
) -> Choice:
    """The best one length for all requests, out of a few: what CUDA graphs of whole decode steps are captured for.

    survival, values, price as in `choose_lengths`; costs: milliseconds of a step at each length. Raises ValueError
    where `lengths` and `costs` do not pair, or a length exceeds what survival knows.
    """
    if len(lengths) != len(costs) or not lengths or max(lengths) > survival.shape[1]:
        raise ValueError(f"lengths {list(lengths)} do not fit {len(costs)} costs and k_max {survival.shape[1]}")
    gained = np.concatenate([[0.0], np.cumsum(values.sum(axis=0))])
    best = max(range(len(lengths)), key=lambda index: gained[lengths[index]] - price * costs[index])
    length = lengths[best]
    tokens = len(survival) + float(survival[:, :length].sum())
    return Choice(np.full(len(survival), length, np.int64), tokens, float(costs[best]))


def _prepare(
    survival: np.ndarray, caps: np.ndarray | int, cost: DraftCost, price: float, passes: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What a step takes more by its longest draft, float64 [k_max + 1], and caps as an array, [n] or [1]."""
    fixed, per_token, per_pass, once = cost
    if not fixed > 0 or min(per_token, per_pass, once) < 0:
        raise ValueError(f"times must be positive, got {cost}")
    if not price >= 0:
        raise ValueError(f"the price of a millisecond must not be negative, got {price}")
    extra = np.arange(survival.shape[1] + 1.0) if passes is None else np.array(passes, np.float64)
    extra *= per_pass
    extra[1:] += once
    return extra, np.array([caps], np.int64) if isinstance(caps, int) else np.ascontiguousarray(caps, np.int64)


def _order(values: np.ndarray) -> np.ndarray:
    """As the loops are compiled for."""
    return np.ascontiguousarray(values, np.float64)
