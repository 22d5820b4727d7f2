# SPDX-License-Identifier: Apache-2.0
"""What batches of both phases cost: from the times of both, and from what is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.latency import ShareModel
from vllm_ext.scheduling.phases.mixing import CHUNK, MixedModel

TOKEN, STEP, BUDGET = 1e-4, 0.01, 512
PROMPTS, OUTPUTS = np.full(100, 800.0), [200, 100, 300]


def make_model(pace: float = math.inf) -> MixedModel:
    """On a device whose times at full share are known."""
    token_time, step_time = ShareModel(0.9, memory=10), ShareModel(0.4, memory=10)
    for _ in range(10):
        token_time.observe(1.0, TOKEN)
        step_time.observe(1.0, STEP)
    return MixedModel(BUDGET, 0.9, token_time, step_time, pace)


@pytest.fixture
def model() -> MixedModel:
    return make_model()


def test_latencies_follow_from_both_phases(model: MixedModel) -> None:
    ttft, tpot = model.predict(PROMPTS, 0.001, 0, OUTPUTS)
    assert ttft == pytest.approx(800 * (TOKEN + STEP / BUDGET) + STEP, rel=0.02)
    assert tpot == pytest.approx(STEP, rel=0.02)
    # Prompts take their part of the time, and steps share the rest.
    tpot = model.predict(PROMPTS, 6.0, 0, [100_000])[1]
    assert tpot == pytest.approx(STEP / (1 - 6.0 * 800 * TOKEN), rel=0.1)
    # Who waits already counts.
    assert model.predict(PROMPTS, 0.001, 100_000, OUTPUTS)[0] > 100_000 * TOKEN


def test_no_batch_is_longer_than_a_full_one(model: MixedModel) -> None:
    full = pytest.approx(STEP + BUDGET * TOKEN, rel=0.02)
    assert model.predict(PROMPTS, 1e6, 0, OUTPUTS)[1] == full
    # Nothing is known of requests: all of their batches may be full; but not without prompts.
    assert model.predict(PROMPTS, 4.0, 0, [])[1] == full
    assert model.predict(PROMPTS, 0.0, 0, [])[1] == pytest.approx(STEP, rel=0.02)


def test_no_batch_is_longer_than_tokens_may_take() -> None:
    model = make_model(pace=0.03)
    # (0.03 - 0.01) / 1e-4, and a multiple of the chunk.
    assert model.num_tokens == 192
    assert model.predict(PROMPTS, 1e6, 0, OUTPUTS)[1] == pytest.approx(STEP + 192 * TOKEN, rel=0.02)
    # The step is shared by fewer prompt tokens, so that first tokens come later.
    assert model.token > make_model().token
    assert make_model(pace=1.0).num_tokens == BUDGET
    # Prompts go on where a step alone takes longer than that.
    assert make_model(pace=STEP / 2).num_tokens == CHUNK


@given(st.floats(0.5, 2.0), st.floats(0.015, 0.05))
def test_batches_end_within_the_pace_whatever_the_device_takes(slower: float, pace: float) -> None:
    model = make_model(pace)
    for _ in range(400):
        tokens = model.num_tokens
        model.observe(slower * (STEP + tokens * TOKEN), tokens)
    took = slower * (STEP + model.num_tokens * TOKEN)
    assert took <= 1.02 * pace or model.num_tokens == CHUNK
    # And are no shorter than they must be.
    assert took + 1.05 * slower * CHUNK * TOKEN > 0.98 * pace or model.num_tokens == BUDGET


def test_few_long_prompts_are_worse_than_many_short_ones(model: MixedModel) -> None:
    uneven = np.where(np.arange(100) % 10 == 0, 8000.0, 0.0)
    assert model.predict(uneven, 4.0, 0, OUTPUTS)[1] > 1.1 * model.predict(PROMPTS, 4.0, 0, OUTPUTS)[1]


@pytest.mark.parametrize("slower", [0.7, 1.5])
def test_what_batches_take_is_measured(model: MixedModel, slower: float) -> None:
    before, token = model.predict(PROMPTS, 0.001, 0, OUTPUTS), model.token
    for _ in range(400):
        model.observe(slower * (STEP + 500 * TOKEN), 500)
    assert model.token == pytest.approx(slower * token, rel=0.02)
    assert model.predict(PROMPTS, 0.001, 0, OUTPUTS) == pytest.approx([slower * one for one in before], rel=0.03)


def test_latencies_are_corrected_by_what_is_measured(model: MixedModel) -> None:
    ttft, tpot = model.predict(PROMPTS, 4.0, 0, OUTPUTS)
    for _ in range(20):
        model.correct(PROMPTS, 4.0, OUTPUTS, 1.3 * (ttft - STEP), None)
    assert model.predict(PROMPTS, 4.0, 0, OUTPUTS) == pytest.approx([1.3 * (ttft - STEP) + STEP, tpot], rel=0.02)
    for _ in range(20):
        model.correct(PROMPTS, 4.0, OUTPUTS, None, 100 * tpot)
    # One that is far off counts as a factor of two.
    assert model.predict(PROMPTS, 4.0, 0, OUTPUTS)[1] == pytest.approx(2 * tpot, rel=0.02)


def test_a_batch_has_room() -> None:
    model = ShareModel(0.5, memory=1)
    with pytest.raises(ValueError, match="mix_budget 0 must be at least one token"):
        MixedModel(0, 0.9, model, model)
    # Before anything is measured, nothing is learned.
    empty = MixedModel(1, 0.9, model, model)
    empty.observe(1.0, 5)
    assert empty.token == 0.0
