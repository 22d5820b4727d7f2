# SPDX-License-Identifier: Apache-2.0
"""The step-time fit: finds what a step costs, ignores spikes, follows changes, never goes below zero."""

from collections.abc import Mapping

import numpy as np
import pytest

from vllm_ext.speculation.step_time import (
    COEFFICIENTS,
    DEFAULT_PRIOR,
    SPIKES_IN_A_ROW,
    WARMUP_STEPS,
    StepFeatures,
    StepTimeModel,
)

TRUE = dict(zip(COEFFICIENTS, (12.0, 0.4, 5e-4, 0.05, 1.5, 0.02, 0.8), strict=True))


def measure(features: StepFeatures, true: Mapping[str, float] = TRUE) -> float:
    return true["step"] + sum(true[name] * value for name, value in features._asdict().items())


def draw_features(rng: np.random.Generator) -> StepFeatures:
    requests, passes = int(rng.integers(1, 33)), int(rng.integers(0, 6))
    drafted = int(rng.integers(0, passes * requests + 1))
    context = requests * int(rng.integers(100, 2000))
    return StepFeatures(requests + drafted, context, requests, passes, drafted, int(drafted > 0))


def run(model: StepTimeModel, steps: int, noise: float = 0.05, true: Mapping[str, float] = TRUE, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        features = draw_features(rng)
        model.observe(features, measure(features, true) * float(rng.lognormal(0, noise)))


def worst_error(model: StepTimeModel, true: Mapping[str, float] = TRUE) -> float:
    rng = np.random.default_rng(99)
    return max(
        abs(model.predict(features) / measure(features, true) - 1)
        for features in (draw_features(rng) for _ in range(50))
    )


def test_predictions_are_right_after_two_hundred_steps() -> None:
    model = StepTimeModel()
    run(model, 200)
    assert worst_error(model) < 0.08
    assert min(model.coefficients.values()) >= 0


def test_a_compilation_of_seconds_changes_nothing() -> None:
    model = StepTimeModel()
    run(model, 100)
    before = model.coefficients
    for _ in range(SPIKES_IN_A_ROW - 1):
        model.observe(StepFeatures(8, 4000, 8, 0, 0), 2000.0)
    assert model.coefficients == before
    run(model, 64, seed=1)
    assert worst_error(model) < 0.1


def test_the_first_steps_are_not_believed() -> None:
    model = StepTimeModel()
    for _ in range(WARMUP_STEPS):
        model.observe(StepFeatures(8, 4000, 8, 0, 0), 1500.0)
    assert model.num_observed == 0
    run(model, 100)
    assert worst_error(model) < 0.1


def test_a_slower_machine_is_noticed() -> None:
    model = StepTimeModel()
    run(model, 200)
    slower = {name: 5 * value for name, value in TRUE.items()}
    run(model, 250, true=slower, seed=2)
    assert worst_error(model, slower) < 0.1


def test_what_never_varies_stays_at_its_prior() -> None:
    """With one length all the time only the sum of what a draft costs is seen; it must not be guessed apart."""
    model = StepTimeModel({"drafted": 0.2})
    for _ in range(150):
        features = StepFeatures(16, 4000, 4, 3, 12)
        model.observe(features, measure(features))
    assert model.predict(StepFeatures(16, 4000, 4, 3, 12)) == pytest.approx(measure(features), rel=0.03)
    assert all(value >= 0 for value in model.coefficients.values())
    cost = model.describe_cost(StepFeatures(4, 4000, 4, 0, 0), has_passes=True)
    assert cost.fixed > 0
    assert cost.per_token >= 0


@pytest.mark.parametrize("prior", [{"token": 1.0}, {"tokens": -1.0}, {"tokens": float("nan")}, {"step": float("inf")}])
def test_priors_that_are_none(prior: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be non-negative milliseconds by step, tokens"):
        StepTimeModel(prior)


@pytest.mark.parametrize("prior", [dict.fromkeys(COEFFICIENTS, 0.0), dict.fromkeys(COEFFICIENTS, 1e-320), None])
def test_a_prior_that_says_nothing_stops_nothing(prior: dict[str, float] | None) -> None:
    model = StepTimeModel(prior)
    run(model, 100)
    assert np.isfinite(list(model.coefficients.values())).all()
    assert worst_error(model) < 0.2


def test_numbers_without_a_solution_leave_the_last_fit() -> None:
    model = StepTimeModel(TRUE)
    run(model, 100)
    before = model.coefficients
    for _ in range(64):
        model.observe(StepFeatures(8, 10**300, 8, 0, 0), 20.0)
    run(model, 16)
    assert model.coefficients == before


@pytest.mark.parametrize("true", [{**TRUE, "tokens": 4.0}, {**TRUE, "step": 1.2, "passes": 0.15}])
def test_a_guess_is_held_less_than_a_measurement(true: dict[str, float]) -> None:
    """Steps of one kind, and the part that the guess got wrong is found by the few that differ."""
    errors = []
    for prior in (None, DEFAULT_PRIOR):
        model, rng = StepTimeModel(prior), np.random.default_rng(0)
        for step in range(60):
            features = StepFeatures(8 if step % 12 == 0 else 4, 2000, 4, 0, 0)
            model.observe(features, measure(features, true) * float(rng.lognormal(0, 0.03)))
        marginal = model.predict(StepFeatures(5, 2000, 4, 0, 0)) - model.predict(StepFeatures(4, 2000, 4, 0, 0))
        errors.append(abs(np.log(marginal / true["tokens"])))
    assert errors[0] < errors[1]
    assert errors[0] < 0.3


def test_the_few_steps_that_tell_are_kept() -> None:
    """Probes come less often than the window is long; what they say of a draft's time is not forgotten."""
    model, rng = StepTimeModel({**TRUE, "tokens": 0.1}), np.random.default_rng(0)
    plain, probe = StepFeatures(4, 2000, 4, 0, 0), StepFeatures(8, 2000, 4, 1, 4)
    for step in range(4000):
        features = probe if step % 97 == 0 else plain
        model.observe(features, measure(features) * float(rng.lognormal(0, 0.05)))
    more = model.predict(probe) - model.predict(plain)
    assert more == pytest.approx(measure(probe) - measure(plain), rel=0.15)
    slower = {name: 5 * value for name, value in TRUE.items()}
    # What was kept of a faster machine is of no use on a slower one.
    for step in range(400):
        features = probe if step % 97 == 0 else plain
        model.observe(features, measure(features, slower) * float(rng.lognormal(0, 0.05)))
    assert model.predict(plain) == pytest.approx(measure(plain, slower), rel=0.05)
