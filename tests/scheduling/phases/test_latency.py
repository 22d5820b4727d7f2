# SPDX-License-Identifier: Apache-2.0
"""The latency models against samples that they should fit and queues that are simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.latency import ArrivalRate, ShareModel, find_quantile, find_ttft_quantile


def test_two_shares_tell_what_scales() -> None:
    model = ShareModel(0.5, memory=100)
    for _ in range(50):
        for share in (0.3, 0.8):
            model.observe(share, 8 / share + 3)
    a, b = model.coefficients
    assert a == pytest.approx(8, rel=0.05)
    assert b == pytest.approx(3, abs=1)
    assert model.predict(0.5) == pytest.approx(19, rel=0.03)


@pytest.mark.parametrize("scaling", [0.0, 0.4, 0.9, 1.0])
def test_one_share_keeps_the_proportion(scaling: float) -> None:
    model = ShareModel(scaling, memory=50)
    for _ in range(20):
        model.observe(0.5, 30.0)
    a, b = model.coefficients
    assert model.predict(0.5) == pytest.approx(30)
    assert a / (a + b) == pytest.approx(scaling, abs=1e-9)


def test_the_past_is_forgotten() -> None:
    model = ShareModel(0.4, memory=64)
    for _ in range(1000):
        model.observe(0.5, 20.0)
    for _ in range(3 * 64):
        model.observe(0.5, 60.0)
    assert model.predict(0.5) == pytest.approx(60, rel=0.06)


@given(
    st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(1e-3, 1e3), st.floats(0.5, 100)), min_size=1, max_size=40),
    st.floats(0, 1),
)
@settings(max_examples=100)
def test_times_stay_positive_and_fall_with_the_share(samples: list[tuple[float, float, float]], scaling: float) -> None:
    model = ShareModel(scaling, memory=20)
    for share, time, weight in samples:
        model.observe(share, time, weight)
    a, b = model.coefficients
    assert a >= 0
    assert b >= 0
    assert 0 < model.predict(1.0) <= model.predict(0.1) < math.inf


def test_samples_that_say_nothing_are_left_out() -> None:
    model = ShareModel(0.5, memory=10)
    for share, time in ((0.0, 1.0), (0.5, 0.0), (0.5, math.nan), (1.5, 1.0), (0.5, math.inf)):
        model.observe(share, time)
    assert model.num_observed == 0
    assert model.predict(0.5) == 0


@pytest.mark.parametrize(("scaling", "memory"), [(1.5, 10), (-0.1, 10), (0.5, 0)])
def test_a_model_that_cannot_be(scaling: float, memory: float) -> None:
    with pytest.raises(ValueError, match=f"scaling {scaling}"):
        ShareModel(scaling, memory=memory)


def draw_services(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "fixed": np.ones(count),
        "exponential": rng.exponential(1.0, count),
        "heavy": np.exp(rng.normal(-0.5, 1.0, count)),
    }[kind]


def simulate_queue(services: np.ndarray, rate: float) -> np.ndarray:
    """Waiting plus service of every arrival at one server, first come, first served (Lindley's recursion)."""
    gaps = np.random.default_rng(4).exponential(1 / rate, len(services))
    wait = 0.0
    total = np.empty(len(services))
    for index, (gap, service) in enumerate(zip(gaps.tolist(), services.tolist(), strict=True)):
        wait = max(0.0, wait - gap)
        total[index] = wait + service
        wait += service
    return total


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
@pytest.mark.parametrize("kind", ["fixed", "exponential", "heavy"])
def test_quantile_of_a_queue(kind: str, load: float) -> None:
    services = draw_services(kind, 40_000)
    rate = load / float(services.mean())
    simulated = float(np.quantile(simulate_queue(services, rate), 0.9))
    assert find_ttft_quantile(services, rate, 0.9) == pytest.approx(simulated, rel=0.12)


def test_quantile_of_the_exponential_queue_is_exact() -> None:
    services = -np.log((np.arange(4000) + 0.5) / 4000)  # quantiles of mean 1
    for rate in (0.3, 0.6, 0.9):
        assert find_ttft_quantile(services, rate, 0.9) == pytest.approx(math.log(10) / (1 - rate), rel=0.01)


def test_too_much_is_worse_than_enough() -> None:
    services = draw_services("exponential", 500)
    latencies = [float(find_ttft_quantile(services, rate, 0.9)) for rate in (0.0, 0.5, 0.9, 1.0, 1.2, 2.0)]
    assert latencies == sorted(latencies)
    assert np.isfinite(latencies).all()
    assert latencies[0] == pytest.approx(float(np.quantile(services, 0.9)))


def test_rows_are_queues_of_their_own() -> None:
    services = draw_services("heavy", 200)
    both = find_ttft_quantile(np.stack([services, 2 * services]), 0.3, 0.9)
    assert both.tolist() == pytest.approx(
        [float(find_ttft_quantile(row, 0.3, 0.9)) for row in (services, 2 * services)]
    )


def test_arrival_rate_follows() -> None:
    rate, rng, now = ArrivalRate(10.0), np.random.default_rng(0), 0.0
    assert rate.measure(0.0) == 0
    for target in (4.0, 20.0):
        for gap in rng.exponential(1 / target, int(40 * target)).tolist():
            now += gap
            rate.observe(now)
        assert rate.measure(now) == pytest.approx(target, rel=0.25)
    assert rate.measure(now + 100) < 0.01


def test_few_values_have_no_quantile() -> None:
    assert find_quantile([1.0] * 9, 0.9) is None
    assert find_quantile([1.0] * 10, 0.9) == 1.0
