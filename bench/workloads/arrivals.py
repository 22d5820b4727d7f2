# SPDX-License-Identifier: Apache-2.0
"""Times at which requests arrive, in seconds after the start."""

from __future__ import annotations

import numpy as np


def draw_gamma_arrivals(
    generator: np.random.Generator, count: int, rate: float, burstiness: float = 1.0
) -> list[float]:
    """`count` times of a renewal process with gamma-distributed gaps; the first request comes at 0.

    `rate` is in requests per second. `burstiness` is the shape of the gamma distribution, as in
    `vllm bench serve --burstiness`: 1 is a Poisson process, less comes in bursts (squared coefficient of variation
    1 / burstiness), more is regular. Unlike vLLM's the times are not stretched to hit the rate exactly.
    Raises ValueError unless rate and burstiness are above 0 and finite.
    """
    if not (0 < rate < np.inf and 0 < burstiness < np.inf):
        raise ValueError(f"rate and burstiness must be above 0 and finite, got {rate} and {burstiness}")
    gaps = generator.gamma(burstiness, 1 / (rate * burstiness), size=max(0, count - 1))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


def draw_gamma_window(
    generator: np.random.Generator, seconds: float, rate: float, burstiness: float = 1.0
) -> list[float]:
    """Times of the same process within [0, seconds); none where the first gap is longer.

    Raises ValueError as `draw_gamma_arrivals`, and for `seconds` not above 0.
    """
    if not 0 < seconds < np.inf:
        raise ValueError(f"seconds must be above 0 and finite, got {seconds}")
    if not (0 < rate < np.inf and 0 < burstiness < np.inf):
        raise ValueError(f"rate and burstiness must be above 0 and finite, got {rate} and {burstiness}")
    times: list[float] = []
    # A window begins at an arbitrary moment of the process, which falls into a gap with probability proportional to its
    # length. Such gaps are gamma-distributed with one more in the shape; a uniform part of one is left.
    time = float(generator.gamma(burstiness + 1, 1 / (rate * burstiness)) * generator.random())
    while time < seconds:
        times.append(time)
        time += float(generator.gamma(burstiness, 1 / (rate * burstiness)))
    return times
