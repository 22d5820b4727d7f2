# SPDX-License-Identifier: Apache-2.0
"""What batches of both phases cost: from the times of both, and from what is measured."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.scheduling.phases.latency import ShareModel
from vllm_ext.scheduling.phases.mixing import GAP, MixedModel

TOKEN, STEP, BUDGET = 1e-4, 0.01, 512
PROMPTS, OUTPUTS = np.full(100, 800.0), [200, 100, 300]


@pytest.fixture
def model() -> MixedModel:
    """On a device whose times at full share are known."""
    token_time, step_time = ShareModel(0.9, memory=10), ShareModel(0.4, memory=10)
    for _ in range(10):
        token_time.observe(1.0, TOKEN)
        step_time.observe(1.0, STEP)
    return MixedModel(BUDGET, 0.9, token_time, step_time)


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


def test_few_long_prompts_are_worse_than_many_short_ones(model: MixedModel) -> None:
    uneven = np.where(np.arange(100) % 10 == 0, 8000.0, 0.0)
    assert model.predict(uneven, 6.0, 0, OUTPUTS)[1] > 1.1 * model.predict(PROMPTS, 6.0, 0, OUTPUTS)[1]


def test_a_long_gap_counts_where_requests_see_one(model: MixedModel) -> None:
    """A mean hides it: a hundred steps and one batch with a prompt of 400 tokens."""
    prompts, gap = np.full(100, 400.0), STEP + 400 * TOKEN
    seldom, often = (model.predict(prompts, rate, 0, [100])[1] for rate in (0.05, 0.2))
    assert seldom < 1.2 * STEP
    assert often == pytest.approx(gap / GAP, rel=0.02)
    # One prompt in ten is long, and a tenth of the requests meets one of them: the others count.
    uneven = np.where(np.arange(100) % 10 == 0, 400.0, 10.0)
    assert model.predict(uneven, 0.2, 0, [100])[1] < 1.3 * STEP
    assert model.predict(uneven, 2.0, 0, [100])[1] == pytest.approx(gap / GAP, rel=0.02)


@pytest.mark.parametrize("slower", [0.7, 1.5])
def test_what_batches_take_is_measured(model: MixedModel, slower: float) -> None:
    before, token = model.predict(PROMPTS, 0.001, 0, OUTPUTS), model.token
    for _ in range(400):
        model.observe(slower * (STEP + 500 * TOKEN), 500)
    assert model.token == pytest.approx(slower * token, rel=0.02)
    assert model.predict(PROMPTS, 0.001, 0, OUTPUTS) == pytest.approx([slower * one for one in before], rel=0.03)


def test_latencies_are_corrected_by_what_is_measured(model: MixedModel) -> None:
    ttft, tpot = model.predict(PROMPTS, 6.0, 0, OUTPUTS)
    for _ in range(20):
        model.correct(PROMPTS, 6.0, OUTPUTS, 1.3 * (ttft - STEP), None)
    assert model.predict(PROMPTS, 6.0, 0, OUTPUTS) == pytest.approx([1.3 * (ttft - STEP) + STEP, tpot], rel=0.02)
    for _ in range(20):
        model.correct(PROMPTS, 6.0, OUTPUTS, None, 100 * tpot)
    # One that is far off counts as a factor of two.
    assert model.predict(PROMPTS, 6.0, 0, OUTPUTS)[1] == pytest.approx(2 * tpot, rel=0.02)


def test_a_batch_has_room() -> None:
    model = ShareModel(0.5, memory=1)
    with pytest.raises(ValueError, match="mix_budget 0 must be at least one token"):
        MixedModel(0, 0.9, model, model)
    # Before anything is measured, nothing is learned.
    empty = MixedModel(1, 0.9, model, model)
    empty.observe(1.0, 5)
    assert empty.token == 0.0
