# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, as a function of what is in it, fitted while the engine serves."""

from __future__ import annotations

import json
import operator
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from vllm_ext.speculation.goodput import DraftCost

#: Steps of a new engine that are not representative: kernels compile, caches fill.
WARMUP_STEPS = 8
#: Steps before the first fit.
FIRST_FIT = 8
#: Milliseconds that no step is shorter than.
SHORTEST = 1e-3
#: A step this many times longer than predicted is a spike (a compilation, a pause of the machine) ...
SPIKE = 3.0
#: ... unless so many of the last ones are: then steps have become longer.
SPIKES_IN_A_ROW = 4
#: The latest steps, against which spikes are judged ...
RECENT_STEPS = 24
#: ... and older ones are forgotten where these differ from the fit by more than this factor: the machine, the model's
#: neighbours or the load have changed.
CHANGE = 1.4
#: What the prior weighs: the noise of a step's time, about 6 %, over the prior's error, about 40 %, squared.
RIDGE = (0.06 / 0.4) ** 2
#: A coefficient is held no tighter than one that makes this share of a step.
SMALLEST_SHARE = 0.05


class StepFeatures(NamedTuple):
    """What a step's time depends on. Linear in each: weights are read once, KV and activations per token."""

    tokens: int  # in the forward pass, drafts included
    context_tokens: int  # of KV cache that attention reads
    requests: int
    passes: int  # of the drafter, one per position for a drafter that is a model
    drafted: int  # drafts that were made, over all requests


#: Sizes that make the features comparable: coefficients are then milliseconds of a typical step.
_SCALES = np.array([1.0, 16.0, 4096.0, 8.0, 4.0, 16.0])


class StepTimeModel:
    """milliseconds = c0[mode] + c . features, all c >= 0, by ridge regression over a window of steps.

    The prior is where coefficients stay that the steps say nothing about: while k does not change, `tokens` and
    `drafted` move together and only their sum is seen. Plain recursive least squares is not used: one compilation of a
    second puts it off for hundreds of steps.

    Source: SmartSpec fits linear functions to tables profiled offline (section 4.3); this is fitted online.
    """

    def __init__(
        self,
        prior: Mapping[str, float] | None = None,
        *,
        window: int = 192,
        refit_every: int = 16,
        ridge: float = RIDGE,
    ) -> None:
        """prior: milliseconds by name of `COEFFICIENTS`; ridge: squared noise of a step over squared error of
        the prior, both relative.

        Raises ValueError for an unknown or negative coefficient.
        """
        values = {**DEFAULT_PRIOR, **(prior or {})}
        unknown = sorted(set(values) - set(COEFFICIENTS))
        if unknown or min(values.values()) < 0:
            raise ValueError(f"step times {values} must be non-negative milliseconds by {', '.join(COEFFICIENTS)}")
        self._prior = np.array([values[name] for name in COEFFICIENTS]) * _SCALES
        self._scaled = self._prior
        #: Milliseconds per unit, in plain numbers: every step asks for a few, and arrays of six cost more to begin than
        #: to compute.
        self._plain: list[float] = (self._scaled / _SCALES).tolist()
        self._window, self._refit_every, self._ridge = window, refit_every, ridge
        self._rows = np.zeros((window, len(COEFFICIENTS)))
        self._times = np.zeros(window)
        self._count = 0
        #: Measured over predicted times of the latest steps: spikes are judged against what is missed everywhere.
        self._ratios: deque[float] = deque(maxlen=min(RECENT_STEPS, window))
        #: Whether the prior was measured, here or by an earlier engine, rather than guessed.
        self.is_prior_measured = prior is not None
        #: Steps before this one are forgotten.
        self._first = 0
        self._seen = 0
        self._spikes = 0

    @property
    def num_observed(self) -> int:
        """Steps that the fit has used so far."""
        return self._count

    @property
    def coefficients(self) -> dict[str, float]:
        """Milliseconds by name."""
        return dict(zip(COEFFICIENTS, self._plain, strict=True))

    def predict(self, features: StepFeatures) -> float:
        """Milliseconds of a step."""
        step, *each = self._plain
        return max(SHORTEST, step + sum(map(operator.mul, each, features)))

    def describe_cost(self, features: StepFeatures) -> DraftCost:
        """What drafts add to a step without any (`features`): for `goodput.choose_lengths`."""
        _, token, _, _, each_pass, draft = self._plain
        return DraftCost(self.predict(features), token + draft, each_pass)

    def describe_verification(self, features: StepFeatures) -> DraftCost:
        """As `describe_cost` where the drafts are made already and only the forward pass is still to be paid."""
        return DraftCost(self.predict(features), self._plain[1], 0.0)

    def observe(self, features: StepFeatures, milliseconds: float) -> None:
        """Learn from one measured step; spikes and the first steps are left out."""
        self._seen += 1
        if self._seen <= WARMUP_STEPS or not milliseconds > 0:
            return
        ratio = milliseconds / self.predict(features)
        if self._count >= FIRST_FIT and ratio > SPIKE * statistics.median(self._ratios):
            self._spikes += 1
            if self._spikes < SPIKES_IN_A_ROW:
                return
        else:
            self._spikes = 0
        index = self._count % self._window
        self._rows[index] = (1.0, *features)
        self._times[index] = milliseconds
        self._ratios.append(ratio)
        self._count += 1
        if self._count % self._refit_every == 0 or self._count == FIRST_FIT:
            self._fit()

    def _fit(self) -> None:
        if not 1 / CHANGE < statistics.median(self._ratios) < CHANGE:
            self._first = max(self._first, self._count - RECENT_STEPS)
        used = np.arange(max(self._first, self._count - self._window), self._count) % self._window
        rows, times = self._rows[used] / _SCALES, self._times[used]
        # The prior's shape counts, not its size: a machine ten times slower is so in everything first.
        typical = _find_median(times)
        prior = self._prior * typical / _find_median(rows @ self._prior)
        # Relative errors: a step that takes twice as long may be off by twice as much.
        weight = 1.0 / np.maximum(times, SHORTEST)
        for _ in range(2):
            self._scaled = self._solve(rows * weight[:, None], times * weight, prior, typical)
            # One round of Huber's weights: what is left of the spikes counts less.
            error = np.abs(rows @ self._scaled - times) / times
            limit = 2.5 * max(_find_median(error), 1e-3)
            weight = np.sqrt(np.minimum(1.0, limit / np.maximum(error, 1e-9))) / np.maximum(times, SHORTEST)
        self._plain = (self._scaled / _SCALES).tolist()
        recent = slice(-len(self._ratios), None)
        self._ratios.extend((times[recent] / np.maximum(rows[recent] @ self._scaled, SHORTEST)).tolist())

    def _solve(self, rows: np.ndarray, times: np.ndarray, prior: np.ndarray, typical: float) -> np.ndarray:
        # The prior as one row for each coefficient, in units of a typical step, as the measured rows are.
        # A prior is off by a part of itself, so small coefficients are held in proportion.
        pull = np.sqrt(self._ridge) / np.maximum(prior, SMALLEST_SHARE * typical)
        matrix = np.concatenate([rows, np.diag(pull)])
        target = np.concatenate([times, pull * prior])
        # The same minimum from the normal equations' Cholesky factor: six rows instead of a window of them.
        factor = np.linalg.cholesky(matrix.T @ matrix + 1e-12 * np.eye(len(COEFFICIENTS)))
        return nnls(factor.T, np.linalg.solve(factor, matrix.T @ target))[0]


def _find_median(values: np.ndarray) -> float:
    """np.median of a few hundred numbers, in a third of its time."""
    return statistics.median(values.tolist())


#: Names of the coefficients, milliseconds per unit.
COEFFICIENTS = ("step", *StepFeatures._fields)

#: A small model on a CPU; a few dozen steps replace it.
DEFAULT_PRIOR: Mapping[str, float] = {
    "step": 4.0,
    "tokens": 0.05,
    "context_tokens": 1e-4,
    "requests": 0.02,
    "passes": 0.2,
    "drafted": 0.01,
}


def load_prior(path: Path) -> dict[str, float] | None:
    """Coefficients that an earlier engine stored; None where there are none or they cannot be used."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A cache: what cannot be read is measured again.
        return None
    if not isinstance(values, dict) or set(values) != set(COEFFICIENTS):
        return None
    if not all(isinstance(value, int | float) and 0 <= value < 1e9 for value in values.values()):
        return None
    return {name: float(value) for name, value in values.items()}


def store_prior(path: Path, coefficients: Mapping[str, float]) -> None:
    """Keep coefficients for the next engine of the same model and device. Raises OSError where the disk does."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(coefficients)) + "\n", encoding="utf-8")
    partial.replace(path)
