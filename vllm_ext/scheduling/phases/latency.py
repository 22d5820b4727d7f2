# SPDX-License-Identifier: Apache-2.0
"""How long prefill and decode take at a share of the device, fitted while serving, and how long prompts wait."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: A queue this full is called unstable: waiting times above it say how much too much comes in, not how long it waits.
FULL = 0.97


class ShareModel:
    """time(share) = a / share + b, a and b >= 0: what needs the cores of the device, and what does not.

    A weighted fit in which every new sample makes the older ones count less, so that it follows the load. Where all
    samples have one share, a and b cannot be told apart: the prior's proportion stays, at the measured level.

    Source: semi-PD (arXiv:2504.19867, Eq. 3 and 4) has TPOT(y) = a/y + b, refitted from a table of all windows so far.
    """

    def __init__(self, scaling: float, *, memory: float, ridge: float = 0.02) -> None:
        """scaling: the part of the time at full share that scales, between 0 and 1, before anything is measured.
        memory: how many samples count. ridge: what the prior weighs against the samples.

        Raises ValueError for a scaling outside 0 to 1 or a memory below one sample.
        """
        if not 0 <= scaling <= 1 or memory < 1:
            raise ValueError(f"scaling {scaling} must be in 0..1 and memory {memory} at least 1 sample")
        self._scaling = scaling
        self._keep, self._ridge = 1 - 1 / memory, ridge
        # Sums over samples, each less the older it is: of 1, 1/share, 1/share^2, time and time/share. Plain numbers: a
        # sample is taken at every step of the engine.
        self._weight = self._inverse = self._square = self._time = self._product = 0.0
        self._coefficients: tuple[float, float] | None = (0.0, 0.0)  # None where there are newer samples
        self.num_observed = 0

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b), in the unit of the observed times; zeros before the first."""
        if self._coefficients is None:
            self._coefficients = self._solve()
        return self._coefficients

    def observe(self, share: float, time: float, weight: float = 1.0) -> None:
        """One measured time at a share in (0, 1]; what is not positive is left out."""
        if not (0 < share <= 1 and time > 0 and weight > 0 and math.isfinite(time)):
            return
        keep, inverse = self._keep, 1 / share
        self._weight = keep * self._weight + weight
        self._inverse = keep * self._inverse + weight * inverse
        self._square = keep * self._square + weight * inverse * inverse
        self._time = keep * self._time + weight * time
        self._product = keep * self._product + weight * time * inverse
        self.num_observed += 1
        self._coefficients = None

    def predict(self, share: float) -> float:
        """Time at a share; 0 before the first sample."""
        a, b = self.coefficients
        return a / share + b

    def _solve(self) -> tuple[float, float]:
        # The prior at the measured level: its best multiple for these samples.
        a, b = self._scaling, 1 - self._scaling
        level = (a * self._product + b * self._time) / (
            a * a * self._square + 2 * a * b * self._inverse + b * b * self._weight
        )
        # What counts is the error at the measured shares, so the penalty is in the same unit as the sums.
        square, weight = (1 + self._ridge) * self._square, (1 + self._ridge) * self._weight
        product = self._product + self._ridge * self._square * a * level
        time = self._time + self._ridge * self._weight * b * level
        determinant = square * weight - self._inverse * self._inverse
        a = (weight * product - self._inverse * time) / determinant
        b = (square * time - self._inverse * product) / determinant
        if a < 0:
            return 0.0, self._time / self._weight
        if b < 0:
            return self._product / self._square, 0.0
        return a, b


def find_ttft_quantile(services: np.ndarray, rate: float, quantile: float) -> np.ndarray:
    """The quantile of waiting plus service of M/G/1 queues, in the unit of `services`, one for each row.

    services: samples of the service time [..., samples]. rate: arrivals per unit of time. The mean wait is Pollaczek
    and Khinchine's, W = r E[S^2] / (2 (1 - r E[S])), and its distribution 0 with probability 1 - r E[S], else
    exponential: exact for M/M/1, and the usual approximation under heavy traffic. Where more comes in than can be
    served, the result grows with the excess, so that splits can still be compared.

    Source: the paper has M/M/1 (Eq. 1 and 2), which underestimates the wait where prompt lengths vary.
    """
    mean = services.mean(axis=-1)
    if rate <= 0:
        return np.quantile(services, quantile, axis=-1)
    excess = np.maximum(1.0, rate * mean / FULL)
    load = np.minimum(rate * mean, FULL)
    wait = load / mean * (services**2).mean(axis=-1) / (2 * (1 - load))
    decay = (load / wait)[..., None]
    low = np.zeros_like(mean)
    high = services.max(axis=-1) + wait / load * math.log(1 / (1 - quantile)) + mean
    for _ in range(16):  # to 1e-5 of the range: far better than the model
        middle = (low + high) / 2
        # A service longer than that is over it whatever the wait.
        beyond = middle[..., None] - services
        over = np.where(beyond < 0, 1.0, load[..., None] * np.exp(-np.maximum(beyond, 0.0) * decay)).mean(axis=-1)
        low, high = np.where(over > 1 - quantile, middle, low), np.where(over > 1 - quantile, high, middle)
    return high * excess**2


class ArrivalRate:
    """Requests per second, by a moving average over time that forgets."""

    def __init__(self, memory: float) -> None:
        """memory: seconds after which an arrival counts for 1/e."""
        self._memory = memory
        self._count = 0.0
        self._weight = 0.0
        self._last: float | None = None

    def observe(self, now: float, arrivals: int = 1) -> None:
        """So many requests came in at `now`, in seconds."""
        self._advance(now)
        self._count += arrivals

    def measure(self, now: float) -> float:
        """Requests per second up to `now`; 0 before anything is known."""
        self._advance(now)
        return self._count / self._weight if self._weight > 0 else 0.0

    def _advance(self, now: float) -> None:
        if self._last is not None and now > self._last:
            keep = math.exp((self._last - now) / self._memory)
            self._count *= keep
            # The integral of what is kept: time that passed weighs as arrivals do.
            self._weight = self._weight * keep + self._memory * (1 - keep)
        self._last = now if self._last is None else max(now, self._last)


def follow(value: float, ratio: float, weight: float, bound: float) -> float:
    """A correction, nearer by `weight` to a ratio that was measured, which counts up to `bound` either way."""
    return value + weight * (min(max(ratio, 1 / bound), bound) - value)


def find_quantile(values: Sequence[float], quantile: float) -> float | None:
    """The quantile, None where there are fewer than ten values."""
    return float(np.quantile(values, quantile)) if len(values) >= 10 else None
