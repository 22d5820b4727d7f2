# SPDX-License-Identifier: Apache-2.0
"""The simulator: its numbers are those of its model, and the controller keeps up with the oracle in it."""

import numpy as np
import pytest

from bench.speculation.__main__ import COSTS, run_cell
from bench.speculation.policies import FixedLength, Oracle
from bench.speculation.regimes import REGIMES
from bench.speculation.simulator import Workload, read_costs, simulate
from vllm_ext.speculation.step_time import StepFeatures

REGIME = {regime.name: regime for regime in REGIMES}


def test_without_drafts_a_step_makes_one_token_per_request() -> None:
    cost = read_costs(COSTS.read_text())["memory_bound"]
    trace = simulate(FixedLength(0), REGIME["0.85"], cost, Workload.draw(2000, 0), concurrency=4)
    assert trace.tokens == [4.0] * len(trace.tokens)
    assert trace.milliseconds[0] == pytest.approx(
        cost.measure(StepFeatures(4, int(Workload.draw(2000, 0).prompts[:4].sum()), 4, 0, 0))
    )


def test_graph_steps_are_padded() -> None:
    cost = read_costs(COSTS.read_text())["graph_steps"]
    times = [cost.measure(StepFeatures(tokens, 0, 1, 0, 0)) for tokens in (5, 8, 9, 300)]
    assert times[0] == times[1] < times[2]
    assert times[3] == pytest.approx(9.0 + 300 * 0.12 + 0.02)


def test_a_cost_without_all_coefficients() -> None:
    with pytest.raises(ValueError, match="cost a: missing or unknown coefficients"):
        read_costs("a: {step: 1.0, tokens: 1.0}")


@pytest.mark.parametrize("regime", ["none", "0.85", "mixed"])
@pytest.mark.parametrize("kind", ["memory_bound", "compute_bound", "graph_steps"])
def test_no_fixed_length_beats_the_oracle_by_much(kind: str, regime: str) -> None:
    """The oracle is best for a step; over a workload of unequal requests a fixed length can come out a little ahead."""
    cost, workload = read_costs(COSTS.read_text())[kind], Workload.draw(1500, 1)
    oracle = simulate(Oracle(), REGIME[regime], cost, workload, concurrency=4).measure_goodput()
    for length in (0, 1, 4, 8):
        fixed = simulate(FixedLength(length), REGIME[regime], cost, workload, concurrency=4).measure_goodput()
        assert fixed < 1.02 * oracle


def test_ours_keeps_up() -> None:
    cells = [
        run_cell(f"{kind}-{regime}", cost, REGIME[regime], 4, 1, seed)
        for seed, (kind, cost) in enumerate(read_costs(COSTS.read_text()).items())
        for regime in ("none", "0.6", "changing")
    ]
    assert np.mean([cell.vs_oracle for cell in cells]) > 0.96
    assert min(cell.vs_fixed for cell in cells) > 0.93
