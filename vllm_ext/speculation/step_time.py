# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, as a function of what is in it, fitted while the engine serves."""

from __future__ import annotations

import math
import operator
import statistics
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from vllm_ext.speculation.goodput import DraftCost

#: Steps of a new engine that are not representative: kernels compile, caches fill.
WARMUP_STEPS = 8
#: Steps before the first fit.
FIRST_FIT = 8
#: Milliseconds that no step is shorter than.
SHORTEST = 1e-3
#: Once the window is full, one refit in so many, unless steps have changed.
REFIT_SELDOM = 4
#: Stands for nothing where it is divided by.
TINY = 1e-12
#: A step this many times longer than predicted is a spike (a compilation, a pause of the machine) ...
SPIKE = 3.0
#: ... unless so many of the last ones are: then steps have become longer.
SPIKES_IN_A_ROW = 4
#: The latest steps, against which spikes are judged ...
RECENT_STEPS = 24
#: ... and older ones are forgotten where these differ from the fit by more than this factor: the machine, the model's
#: neighbours or the load have changed.
CHANGE = 1.4
#: What a measured prior weighs: the noise of a step's time, about 6 %, over the prior's error, about 40 %, squared.
RIDGE = (0.06 / 0.4) ** 2
#: What a guess weighs: it may be off by several times itself.
GUESS_RIDGE = RIDGE / 50
#: Steps with other numbers of drafts than most, kept when the window has passed them: probes and explored lengths are
#: the only ones that tell what a draft costs, and they are few.
RARE_STEPS = 64
#: What makes a step rare: its tokens or its drafts in the making, by request, differ from the window's median by more.
RARE = 0.02
#: A coefficient is held no tighter than one that makes this share of a step.
SMALLEST_SHARE = 0.05


class StepFeatures(NamedTuple):
    """What a step's time depends on. Linear in each: weights are read once, KV and activations per token."""

    tokens: int  # in the forward pass, drafts included
    context_tokens: int  # of KV cache that attention reads
    requests: int
    passes: int  # of the drafter, where it is a model
    #: Positions that the drafter works on: requests times passes where it is a model, drafts asked for where it is not.
    drafted: int
    #: 1 where any draft is verified: sampling then takes another path, whatever their number.
    verifies: int = 0


#: Sizes that make the features comparable: coefficients are then milliseconds of a typical step.
_SCALES = np.array([1.0, 16.0, 4096.0, 8.0, 4.0, 16.0, 1.0])


class StepTimeModel:
    """milliseconds = c0 + c . features, all c >= 0, by ridge regression over the latest steps and rare ones before.

    The prior is where coefficients stay that the steps say nothing about: while k does not change, `tokens` and
    `drafted` move together and only their sum is seen. One line for all steps: where some run as CUDA graphs and
    others do not, `c0` is between the two. Plain recursive least squares is not used: one compilation of a
    second puts it off for hundreds of steps.

    Source: SmartSpec fits linear functions to tables profiled offline (section 4.3); this is fitted online.
    """

    def __init__(
        self,
        prior: Mapping[str, float] | None = None,
        *,
        window: int = 192,
        refit_every: int = 16,
        ridge: float | None = None,
    ) -> None:
        """prior: measured milliseconds by name of `COEFFICIENTS`, None for a guess; ridge: squared noise of a step over
        squared error of the prior, both relative, None for that of the kind of prior.

        Raises ValueError for an unknown, infinite or negative coefficient.
        """
        values = {**DEFAULT_PRIOR, **(prior or {})}
        unknown = sorted(set(values) - set(COEFFICIENTS))
        if unknown or not all(0 <= value < math.inf for value in values.values()):
            raise ValueError(f"step times {values} must be non-negative milliseconds by {', '.join(COEFFICIENTS)}")
        self._prior = np.array([values[name] for name in COEFFICIENTS]) * _SCALES
        self._scaled = self._prior
        #: Milliseconds per unit, in plain numbers: every step asks for a few, and arrays of seven cost more to begin
        #: than to compute.
        self._plain: list[float] = (self._scaled / _SCALES).tolist()
        self._window, self._refit_every = window, refit_every
        self._ridge = ridge if ridge is not None else GUESS_RIDGE if prior is None else RIDGE
        #: Rows of features and their times: a ring of the latest steps, and behind it a ring of rare ones.
        self._rows = np.zeros((window + RARE_STEPS, len(COEFFICIENTS)))
        self._times = np.zeros(window + RARE_STEPS)
        self._count = self._num_rare = 0
        #: The number that each kept step has among all.
        self._numbers = np.full(window + RARE_STEPS, -1)
        #: Tokens and drafts in the making, by request, of the window's median step.
        self._usual = (1.0, 0.0)
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

    def describe_cost(self, features: StepFeatures, has_passes: bool) -> DraftCost:
        """What drafts add to a step without any (`features`): for `goodput.choose_lengths`.

        has_passes: whether the drafter is a model, each pass of which works on all requests.
        """
        _, token, _, _, each_pass, draft, once = self._plain
        if has_passes:
            return DraftCost(self.predict(features), token, each_pass + draft * features.requests, once)
        return DraftCost(self.predict(features), token + draft, 0.0, once)

    def describe_verification(self, features: StepFeatures) -> DraftCost:
        """As `describe_cost` where the drafts are made already and only the forward pass is still to be paid."""
        return DraftCost(self.predict(features), self._plain[1], 0.0, self._plain[6])

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
        if self._count >= self._window:
            self._keep_rare(index)
        self._rows[index] = (1.0, *features)
        self._times[index] = milliseconds
        self._numbers[index] = self._count
        self._ratios.append(ratio)
        self._count += 1
        if self._count % self._refit_every == 0 or self._count == FIRST_FIT:
            # A few steps more hardly move a fit to a full window, and a fit takes as long as all else in fifty steps.
            is_full = self._count - self._first >= self._window
            if not is_full or self._count % (REFIT_SELDOM * self._refit_every) == 0 or self._has_changed():
                self._fit()

    def _keep_rare(self, index: int) -> None:
        """Move a row of the window, about to be overwritten, to the rare ones if it is one."""
        _, tokens, _, requests, _, drafted, _ = self._rows[index].tolist()
        usual_tokens, usual_drafted = self._usual
        if abs(tokens / requests - usual_tokens) > RARE or abs(drafted / requests - usual_drafted) > RARE:
            place = self._window + self._num_rare % RARE_STEPS
            self._rows[place], self._times[place] = self._rows[index], self._times[index]
            self._numbers[place] = self._numbers[index]
            self._num_rare += 1

    def _has_changed(self) -> bool:
        return not 1 / CHANGE < statistics.median(self._ratios) < CHANGE

    def _fit(self) -> None:
        if self._has_changed():
            self._first = max(self._first, self._count - RECENT_STEPS)
        used = self._numbers >= self._first
        rows, times = self._rows[used] / _SCALES, self._times[used]
        latest = self._rows[: min(self._count, self._window)]
        requests = latest[:, 3]
        self._usual = _find_median(latest[:, 1] / requests), _find_median(latest[:, 5] / requests)
        # The prior's shape counts, not its size: a machine ten times slower is so in everything first.
        typical = _find_median(times)
        prior = self._prior * typical / max(_find_median(rows @ self._prior), TINY)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                fitted = self._fit_twice(rows, times, prior, typical)
        except (np.linalg.LinAlgError, RuntimeError, ValueError):
            # Numbers without a solution must not stop an engine: the last one that was found still holds.
            return
        if not np.isfinite(fitted).all():
            return
        self._scaled = fitted
        self._plain = (fitted / _SCALES).tolist()
        recent = np.arange(max(0, self._count - self._ratios.maxlen), self._count) % self._window  # type: ignore[operator]
        self._ratios.clear()
        predicted = np.maximum(self._rows[recent] / _SCALES @ fitted, SHORTEST)
        self._ratios.extend((self._times[recent] / predicted).tolist())

    def _fit_twice(self, rows: np.ndarray, times: np.ndarray, prior: np.ndarray, typical: float) -> np.ndarray:
        # Relative errors: a step that takes twice as long may be off by twice as much.
        weight = 1.0 / np.maximum(times, SHORTEST)
        fitted = self._solve(rows * weight[:, None], times * weight, prior, typical)
        # One round of Huber's weights: what is left of the spikes counts less.
        error = np.abs(rows @ fitted - times) / times
        limit = 2.5 * max(_find_median(error), 1e-3)
        weight = np.sqrt(np.minimum(1.0, limit / np.maximum(error, 1e-9))) / np.maximum(times, SHORTEST)
        return self._solve(rows * weight[:, None], times * weight, prior, typical)

    def _solve(self, rows: np.ndarray, times: np.ndarray, prior: np.ndarray, typical: float) -> np.ndarray:
        # The prior as one row for each coefficient, in units of a typical step, as the measured rows are.
        # A prior is off by a part of itself, so small coefficients are held in proportion.
        pull = np.sqrt(self._ridge) / np.maximum(prior, SMALLEST_SHARE * typical)
        matrix = np.concatenate([rows, np.diag(pull)])
        target = np.concatenate([times, pull * prior])
        # The same minimum from the normal equations' Cholesky factor: seven rows instead of a window of them.
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
    "verifies": 0.1,
}
