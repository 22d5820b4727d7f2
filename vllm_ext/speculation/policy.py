# SPDX-License-Identifier: Apache-2.0
"""What progress of each request is worth: weights for the objective that draft lengths are chosen by.

Only their ratios count. Weights of a batch have a mean of 1, and where nothing tells requests apart every weight is
exactly 1: the same lengths as without a policy.
"""

from __future__ import annotations

import numpy as np

#: No request weighs more than this many times another by its priority, or by its deadline.
MOST_WEIGHT = 8.0


def weigh_priorities(priorities: np.ndarray) -> np.ndarray:
    """1 for the requests of the most urgent priority in a batch, half of that for each priority after it.

    priorities: int [n], vLLM's: lower is more urgent. Returns float64 [n], at least 1 / MOST_WEIGHT. Levels count, not
    values: 0 and 1 differ as much as 0 and 1000 do.
    """
    _, levels = np.unique(priorities, return_inverse=True)
    return np.maximum(0.5 ** levels.astype(np.float64), 1 / MOST_WEIGHT)


def weigh_deadlines(seconds_left: np.ndarray, tokens_left: np.ndarray, seconds_per_token: np.ndarray) -> np.ndarray:
    """How many times faster than now a request must become to be in time, float64 [n], 1 to MOST_WEIGHT.

    seconds_left: float [n], infinite without a deadline. tokens_left: float [n], the most that it may still put out.
    seconds_per_token: float [n], measured; 0 where nothing was measured yet. A request that is on time weighs 1, and so
    does one that is past its deadline: what is late anyway takes nothing from those that can be in time.
    """
    needed = tokens_left * seconds_per_token
    needed /= np.maximum(seconds_left, 1e-6)
    np.clip(needed, 1.0, MOST_WEIGHT, out=needed)
    return np.where(seconds_left > 0, needed, 1.0)


def normalize(weights: np.ndarray) -> np.ndarray:
    """Weights of mean 1; equal ones become exactly 1."""
    if (weights == weights[:1]).all():
        return np.ones(len(weights))
    return weights * (len(weights) / np.add.reduce(weights))
