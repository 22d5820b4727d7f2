# SPDX-License-Identifier: Apache-2.0
"""A change raises the alarm in a few steps, luck hardly ever."""

import numpy as np
import pytest

from vllm_ext.speculation.change import ChangeDetector


def count_steps(detector: ChangeDetector, believed: float, true: float, count: int, steps: int, seed: int) -> int:
    """Steps until the alarm; `steps` where there was none."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        succeeded = int(np.count_nonzero(rng.random(count) < true))
        if detector.observe(count, believed * count, believed**2 * count, succeeded):
            return step + 1
    return steps


@pytest.mark.parametrize("count", [1, 4, 32])
@pytest.mark.parametrize("believed", [0.05, 0.5, 0.9])
def test_luck_is_no_change(believed: float, count: int) -> None:
    alarms = [count_steps(ChangeDetector(), believed, believed, count, 1000, seed) < 1000 for seed in range(20)]
    # Outcomes of one request are far from normal where most are the same: there one in two thousand steps is enough.
    assert sum(alarms) <= (2 if believed == 0.5 else 10)


@pytest.mark.parametrize("count", [1, 4, 32])
@pytest.mark.parametrize(("believed", "true"), [(0.05, 0.85), (0.9, 0.05), (0.85, 0.3)])
def test_a_change_is_found_in_a_few_steps(believed: float, true: float, count: int) -> None:
    waited = [count_steps(ChangeDetector(), believed, true, count, 100, seed) for seed in range(20)]
    assert np.median(waited) <= 15
    assert max(waited) <= 60


def test_an_alarm_begins_anew_and_nothing_tried_says_nothing() -> None:
    detector = ChangeDetector()
    assert count_steps(detector, 0.05, 1.0, 4, 100, 0) < 8
    # A change for the better may not be over: the sum is half full, and empties where nothing more comes of it.
    assert detector.above == 4.0
    assert not detector.observe(4, 0.2, 0.01, 0)
    assert not detector.observe(0, 0.0, 0.0, 0)
    assert count_steps(detector, 0.5, 0.5, 4, 1000, 0) == 1000
    assert count_steps(detector, 0.95, 0.0, 4, 100, 0) < 8
    assert detector.above == detector.below == 0.0
