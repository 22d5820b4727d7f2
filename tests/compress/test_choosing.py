# SPDX-License-Identifier: Apache-2.0
"""One tile for all units, and only schemes that have a kernel with it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.compress.allocation import AllocationError
from vllm_ext.compress.choosing import Problem, choose_by_layer, choose_globally


def test_no_tile_serves_a_scheme() -> None:
    """A tile without a kernel for the only scheme that fits is passed over; without any tile there is no plan."""
    losses, sizes = np.array([[1.0, 0.5]]), np.array([[1, 2]])
    times = np.array([[[np.inf, 3.0]], [[4.0, 5.0]]])
    problem = Problem(losses, times, sizes, np.array([8]), [0])
    assert choose_globally(problem, 1, time_weight=0.1).tile == 1
    assert choose_globally(problem, 2, time_weight=0.1).tile == 0
    assert choose_by_layer(problem, 2).time_us == 3.0
    none = problem._replace(times=np.full((1, 1, 2), np.inf))
    with pytest.raises(AllocationError, match="has no kernel with this tile"):
        choose_globally(none, 2, time_weight=0.1)
