# SPDX-License-Identifier: Apache-2.0
"""Two arms measured in pairs: medians, spread, the paired ratio with its interval, and a verdict.

Five pairs are few. A percentile bootstrap of five numbers never leaves their range, and stock against stock then shows
a "difference" in about 16 of 100 trials at a nominal 5 (tests/bench/test_statistics.py measures it). So the interval is
at a confidence of 99 %, because a table holds ten metrics, and it is never narrower than Student's t of the mean log
ratio, which has its nominal coverage for any number of pairs of normal noise. Two equal arms that take turns have
log ratios symmetric about 0 whatever the noise; for symmetric noise with heavy tails Student's t errs on the side of
"no difference" (Benjamini 1983, "Is the t test really conservative when the parent distribution is long-tailed?").

Pairs of one run share two processes, and two processes of one program differ in speed by themselves, by how their
memory happens to lie: no number of pairs shows that. So times and rates need a difference of `TIME_MARGIN` at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

#: Two-sided. At 95 % a table of ten metrics of equal arms would hold a false verdict in four runs of ten.
CONFIDENCE = 0.99
RESAMPLES = 2000
#: Ratios of times within this of 1 are no difference, however narrow their interval. `python -m bench.selfcheck` finds
#: that ratios of equal arms that share their processes for four trials are off by 1 % to 2 % together.
TIME_MARGIN = 0.01
_TIMES = ("s", "ms", "us")
#: Differences of one sign that make a verdict where there is no ratio. So many agree by chance in 3 of 100 cases of
#: equal arms: more often than an interval errs, so this stands in only where a value is 0.
SIGNS = 6

Verdict = Literal["win", "loss", "no difference"]


@dataclass(frozen=True)
class Comparison:
    """The pack against stock on one metric. `ratio` > 1 means that the pack is better, whatever the direction.

    Spreads are the 10th and 90th percentile of each arm; `low` and `high` bound the ratio at `CONFIDENCE`.
    """

    median_stock: float
    median_pack: float
    spread_stock: tuple[float, float]
    spread_pack: tuple[float, float]
    ratio: float
    low: float
    high: float
    verdict: Verdict
    pairs: int


def choose_margin(unit: str) -> float:
    """The margin of `compare` for values of this unit: `TIME_MARGIN` for times and rates, 0 for all others."""
    return TIME_MARGIN if unit in _TIMES or unit.endswith("/s") else 0.0


def compare(stock: Sequence[float], pack: Sequence[float], direction: str, margin: float = 0.0) -> Comparison:
    """Compare two arms whose values are paired by position; the order within a pair must have taken turns.

    The ratio is the geometric mean of the pairs' ratios. Its interval is the union of two at `CONFIDENCE`: Student's t
    of the mean log ratio, and the percentile bootstrap over pairs (Efron and Tibshirani 1993, chapter 13), which is the
    wider one only with many pairs and skewed noise. A verdict needs an interval without 1, and with a `margin` one
    that ends before 1 + margin or its inverse; one pair has an interval of (0, infinity). The resampling is seeded:
    equal values give equal results.

    Raises ValueError for arms of unequal or no length, a direction other than "lower" and "higher", and values of
    0 or less, which have no ratio (all values equal is a ratio of 1).
    """
    first, second = _check_arms(stock, pack, direction)
    every = np.concatenate([first, second])
    if (every == every[0]).all():
        logs = np.zeros(first.size)
    elif every.min() <= 0:
        raise ValueError(f"value {every.min()} has no ratio; only values above 0 can be compared")
    else:
        logs = np.log(first / second) if direction == "lower" else np.log(second / first)
    low, high = bound_mean(logs)
    return Comparison(
        median_stock=float(np.median(first)),
        median_pack=float(np.median(second)),
        spread_stock=measure_spread(first),
        spread_pack=measure_spread(second),
        ratio=float(np.exp(logs.mean())),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        verdict="win" if low > np.log1p(margin) else "loss" if high < -np.log1p(margin) else "no difference",
        pairs=first.size,
    )


def judge_signs(stock: Sequence[float], pack: Sequence[float], direction: str) -> Verdict:
    """The verdict on pairs of which some have the value 0, as a rate of good answers may: they have no ratio.

    A win or a loss where at least `SIGNS` pairs differ and all of those in the same direction (the sign test, Conover
    1999, section 3.4, with a fixed threshold). Raises ValueError as `compare` does, and not for values of 0.
    """
    first, second = _check_arms(stock, pack, direction)
    if min(first.min(), second.min()) < 0:
        raise ValueError(f"value {min(first.min(), second.min())} is below 0; a rate or a time cannot be")
    better = np.sign(first - second if direction == "lower" else second - first)
    signs = better[better != 0]
    if signs.size < SIGNS or abs(signs.sum()) < signs.size:
        return "no difference"
    return "win" if signs[0] > 0 else "loss"


def measure_spread(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """10th and 90th percentile, interpolated."""
    low, high = np.percentile(np.asarray(values, dtype=np.float64), [10, 90])
    return float(low), float(high)


def bound_mean(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The union of Student's t interval of the mean and of its percentile bootstrap; see `compare`."""
    if values.size < 2:
        return -np.inf, np.inf
    tail = (1 - confidence) / 2
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(values.size)
    half = stats.t.ppf(1 - tail, values.size - 1) * error
    indices = np.random.default_rng(0).integers(values.size, size=(RESAMPLES, values.size))
    low, high = np.quantile(values[indices].mean(axis=1), [tail, 1 - tail])
    return float(min(mean - half, low)), float(max(mean + half, high))


def _check_arms(stock: Sequence[float], pack: Sequence[float], direction: str) -> tuple[np.ndarray, np.ndarray]:
    if direction not in ("lower", "higher"):
        raise ValueError(f"direction {direction!r}: only metrics that are better 'lower' or 'higher' can be compared")
    first, second = np.asarray(stock, dtype=np.float64), np.asarray(pack, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"arms must be lists of the same length and not empty, got {len(stock)} and {len(pack)} values"
        )
    every = np.concatenate([first, second])
    if not np.isfinite(every).all():
        raise ValueError(f"values must be finite, got {every[~np.isfinite(every)][0]}")
    return first, second
