# SPDX-License-Identifier: Apache-2.0
"""How drafts fare in the simulated workloads."""

from __future__ import annotations

import numpy as np

from bench.speculation.simulator import K_MAX, Regime


def repeat(*chances: float) -> list[np.ndarray]:
    """Kinds of requests, each with one chance at every position."""
    return [np.full(K_MAX, chance) for chance in chances]


REGIMES = (
    Regime("none", [(0.0, repeat(0.02))]),
    Regime("0.3", [(0.0, repeat(0.3))]),
    Regime("0.6", [(0.0, repeat(0.6))]),
    Regime("0.85", [(0.0, repeat(0.85))]),
    # Half of the requests repeat their prompt, half do not.
    Regime("mixed", [(0.0, repeat(0.92, 0.15))]),
    # Drafters that are models are sure of their first token and less of each that follows.
    Regime("falling", [(0.0, [np.array([0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1])])]),
    Regime("changing", [(0.0, repeat(0.9)), (0.35, repeat(0.05)), (0.65, repeat(0.85))]),
    # A lookup finds nothing at most places of a text that does not repeat itself.
    Regime("0.85-few", [(0.0, repeat(0.85))], 0.3),
    Regime("changing-few", [(0.0, repeat(0.9)), (0.35, repeat(0.05)), (0.65, repeat(0.85))], 0.3),
)
