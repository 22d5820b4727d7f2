# SPDX-License-Identifier: Apache-2.0
"""Who asks for what and when, and how many were served as promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from vllm_ext.scheduling.phases.controller import Objectives

#: The first requests meet an empty server, the last ones leave one: neither is counted.
EDGE = 0.1


class Arrival(NamedTuple):
    """A request as it comes in."""

    time: float  # seconds
    prompt: int
    output: int


@dataclass
class Served:
    """What a request got, in seconds; None for what it did not."""

    arrival: Arrival
    first_token: float | None = None
    last_token: float | None = None

    def meets(self, objectives: Objectives) -> bool:
        """Whether both of its latencies are within the objectives."""
        if self.first_token is None or self.last_token is None:
            return False
        further = (self.last_token - self.first_token) / max(1, self.arrival.output - 1)
        return self.first_token - self.arrival.time <= objectives.ttft and further <= objectives.tpot


def draw_arrivals(kinds: Sequence[Mapping[str, float]], rate: float, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals, `rate` a second, of requests of several kinds.

    The same seed gives the same requests in the same order at every rate, so that rates are compared on one workload.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0, count)) / rate
    kind = rng.choice(len(kinds), count, p=[one["share"] for one in kinds])
    normal = rng.standard_normal((2, count))
    lengths = []
    for what, deviations in zip(("prompt", "output"), normal, strict=True):
        sigma = np.array([one[f"{what}_sigma"] for one in kinds])[kind]
        middle = np.array([find_median(one[what], one[f"{what}_sigma"], one["longest"]) for one in kinds])[kind]
        longest = np.array([one["longest"] for one in kinds])[kind]
        lengths.append(np.clip(np.rint(middle * np.exp(sigma * deviations)), 1, longest).astype(int).tolist())
    return [Arrival(*one) for one in zip(times.tolist(), *lengths, strict=True)]


def find_median(mean: float, sigma: float, longest: float) -> float:
    """The median of the log-normal distribution that has this mean once what is longer is cut to `longest`."""
    points = norm.ppf((np.arange(2000) + 0.5) / 2000)
    return float(brentq(lambda median: np.minimum(median * np.exp(sigma * points), longest).mean() - mean, 1, 1e6))


def measure_attainment(served: Sequence[Served], objectives: Objectives) -> float:
    """The share of requests that met both objectives, of those that came in neither first nor last."""
    edge = int(len(served) * EDGE)
    counted = served[edge : len(served) - edge]
    return sum(one.meets(objectives) for one in counted) / len(counted)
