# SPDX-License-Identifier: Apache-2.0
"""Weights of requests: neutral where nothing tells them apart, larger where there is hurry, and bounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.policy import MOST_WEIGHT, normalize, weigh_deadlines, weigh_priorities


def test_levels_of_priority_count_not_values() -> None:
    assert weigh_priorities(np.array([5, 0, 1000, 5])).tolist() == [0.5, 1.0, 0.25, 0.5]
    assert weigh_priorities(np.array([-7, -7])).tolist() == [1.0, 1.0]
    assert weigh_priorities(np.arange(9)).min() == 1 / MOST_WEIGHT


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_a_more_urgent_priority_never_weighs_less(priorities: list[int]) -> None:
    weights = weigh_priorities(np.array(priorities))
    order = np.argsort(priorities, kind="stable")
    assert (np.diff(weights[order]) <= 0).all()


def test_deadlines_weigh_by_the_speed_they_need() -> None:
    # 50 tokens in 400 ms: 8 ms each. At 4, 8, 16 and 100 ms a token now.
    left, tokens = np.full(4, 400.0), np.full(4, 50.0)
    assert weigh_deadlines(left, tokens, np.array([4.0, 8.0, 16.0, 100.0])).tolist() == [1.0, 1.0, 2.0, MOST_WEIGHT]
    # Past it, without one, nothing measured yet, nothing left to do.
    others = weigh_deadlines(
        np.array([-1.0, np.inf, 5.0, 5.0]), np.array([9.0, 9.0, 9.0, 0.0]), np.array([9.0, 9, 0, 9])
    )
    assert others.tolist() == [1.0, 1.0, 1.0, 1.0]


@given(
    st.lists(
        st.tuples(st.floats(-1e9, math.inf, allow_nan=False), st.integers(0, 10**6), st.floats(0, 1e9)), min_size=1
    )
)
def test_weights_are_bounded_and_of_mean_one(rows: list[tuple[float, int, float]]) -> None:
    left, tokens, pace = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    weights = weigh_deadlines(left, tokens, pace)
    assert ((weights >= 1) & (weights <= MOST_WEIGHT)).all()
    assert normalize(weights).mean() == pytest.approx(1.0)


@given(st.floats(1e-3, 1e3), st.integers(1, 50))
def test_equal_weights_are_exactly_one(weight: float, count: int) -> None:
    assert normalize(np.full(count, weight)).tolist() == [1.0] * count
