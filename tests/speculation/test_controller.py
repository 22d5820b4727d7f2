# SPDX-License-Identifier: Apache-2.0
"""The controller: it stops speculating where that costs, comes back where it pays, and keeps to what is allowed."""

import numpy as np
import pytest

from vllm_ext.speculation.controller import PROBE_SHARE, PROBE_WANTED, Batch, GoodputController
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

#: A step of 10 ms; a draft costs 1 ms to make for all requests and 0.3 ms to verify for each.
PRIOR = {"step": 10.0, "tokens": 0.3, "context_tokens": 0.0, "requests": 0.0, "passes": 1.0, "drafted": 0.0}
REQUESTS = ["a", "b", "c", "d"]


def make_controller(**settings: object) -> GoodputController:
    return GoodputController(6, step_time=StepTimeModel(PRIOR), **settings)  # type: ignore[arg-type]


def serve(controller: GoodputController, chance: float, steps: int, seed: int = 0) -> list[np.ndarray]:
    """Steps of four requests whose drafts are accepted with one chance; returns the lengths."""
    rng = np.random.default_rng(seed)
    batch = Batch(REQUESTS, 4, 1000)
    history = []
    for _ in range(steps):
        lengths = controller.plan_drafts(batch).lengths
        passed = np.cumprod(rng.random((4, 6)) < chance, axis=1).sum(axis=1)
        drafted = int(lengths.sum())
        features = StepFeatures(4 + drafted, 1000, 4, int(lengths.max()), drafted)
        time = 10.0 + 0.3 * (4 + drafted) + 1.0 * int(lengths.max())
        controller.observe(REQUESTS, lengths, np.minimum(passed, lengths), features, time * rng.lognormal(0, 0.03))
        history.append(lengths)
    return history


def test_good_drafts_are_long_and_bad_ones_stop() -> None:
    assert np.mean(serve(make_controller(), 0.95, 150)[50:]) > 4
    assert np.mean(serve(make_controller(), 0.02, 300)[100:]) < 0.05


def test_not_speculating_is_not_for_ever() -> None:
    controller = make_controller()
    serve(controller, 0.02, 400)
    history = serve(controller, 0.95, 100, seed=1)
    assert np.mean(history[-20:]) > 3


@pytest.mark.parametrize("dearness", [1.0, 10.0])
def test_probes_keep_to_their_share_of_the_time(dearness: float) -> None:
    """As many requests as that pays for, seldom where one alone is dear, and not the same ones each time."""
    controller = GoodputController(6, step_time=StepTimeModel({**PRIOR, "tokens": 0.3 * dearness}))
    rng = np.random.default_rng(0)
    history = []
    for _ in range(800):
        lengths = controller.plan_drafts(Batch(REQUESTS, 4, 1000)).lengths
        drafted, passes = int(lengths.sum()), int(lengths.max())
        time = 10.0 + 0.3 * dearness * (4 + drafted) + 1.0 * passes
        features = StepFeatures(4 + drafted, 1000, 4, passes, drafted)
        controller.observe(REQUESTS, lengths, np.zeros(4, int), features, time * rng.lognormal(0, 0.03))
        history.append(lengths)
    probes = [(step, lengths) for step, lengths in enumerate(history) if step >= 200 and lengths.any()]
    assert all(lengths.max() == 1 for _, lengths in probes)
    cost = sum(1.0 + 0.3 * dearness * lengths.sum() for _, lengths in probes) / (600 * (10.0 + 1.2 * dearness))
    assert cost == pytest.approx(PROBE_SHARE, rel=0.5)
    gaps = np.diff([step for step, _ in probes])
    assert (gaps >= (PROBE_WANTED if dearness == 1.0 else PROBE_WANTED + 4)).all()
    assert sum(lengths for _, lengths in probes).min() > 0, "a request was never probed"


def test_caps_are_kept() -> None:
    controller = make_controller()
    serve(controller, 0.95, 60)
    caps = np.array([0, 1, 2, 6])
    for _ in range(30):
        assert (controller.plan_drafts(Batch(REQUESTS, 4, 1000), caps).lengths <= caps).all()


def test_only_what_pays_is_verified() -> None:
    controller = make_controller()
    serve(controller, 0.02, 100)
    batch, drafted = Batch(REQUESTS, 4, 1000), np.array([6, 3, 0, 1])
    trimmed = controller.trim_drafts(batch, drafted)
    assert (trimmed <= drafted).all()
    assert trimmed.sum() <= 1
    assert (controller.trim_drafts(batch, drafted, is_probe=True) == drafted).all()
    serve(controller, 0.97, 100)
    assert controller.trim_drafts(batch, drafted).tolist() == [6, 3, 0, 1]


def test_one_length_for_all_where_graphs_need_it() -> None:
    controller = make_controller(uniform_lengths=(0, 1, 2, 4))
    history = serve(controller, 0.9, 100)
    assert {len(set(lengths)) for lengths in history} == {1}
    assert {int(lengths[0]) for lengths in history} <= {0, 1, 2, 4}
    assert np.mean(history[40:]) > 1.5


def test_a_policy_weighs_requests() -> None:
    def favour_the_first(request_ids: object) -> np.ndarray:
        return np.array([4.0, 0.25, 0.25, 0.25])

    controller = make_controller(policy=favour_the_first)
    lengths = np.mean(serve(controller, 0.6, 200)[50:], axis=0)
    assert lengths[0] > lengths[1:].max() + 0.5


def test_a_policy_is_asked_once_a_step() -> None:
    asked: list[object] = []

    def weigh(request_ids: object) -> np.ndarray:
        asked.append(request_ids)
        return np.ones(4)

    controller, batch = make_controller(policy=weigh), Batch(REQUESTS, 4, 1000)
    for step in range(1, 4):
        controller.trim_drafts(batch, np.array([1, 0, 2, 0]))
        controller.plan_drafts(batch)
        assert len(asked) == step
    # Other requests than were trimmed have other weights.
    controller.trim_drafts(batch, np.array([1, 0, 2, 0]))
    controller.plan_drafts(Batch(REQUESTS[::-1], 4, 1000))
    assert asked[-2:] == [REQUESTS, REQUESTS[::-1]]


def test_gone_requests_are_forgotten() -> None:
    controller = make_controller()
    serve(controller, 0.5, 10)
    controller.forget({"b": None})
    assert len(controller.acceptance) == 1


def test_lengths_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match=r"uniform lengths \[1, 9\] need 0 and nothing above k_max=6"):
        make_controller(uniform_lengths=[1, 9])
