# SPDX-License-Identifier: Apache-2.0
"""The simulator: its numbers are those of its model, it drives the controller as the engine does, and ours keeps up."""

import json

import numpy as np
import pytest

from bench.speculation.__main__ import COSTS, RECOVERY_WINDOW, Group, measure_recovery, run_group, summarize
from bench.speculation.policies import FixedLength, Oracle, Ours, measure_prior
from bench.speculation.regimes import REGIMES
from bench.speculation.simulator import (
    K_MAX,
    Observation,
    Plan,
    Regime,
    TimedTrace,
    Truth,
    Workload,
    read_costs,
    simulate,
)
from vllm_ext.speculation.controller import Batch
from vllm_ext.speculation.step_time import COEFFICIENTS, StepFeatures

REGIME = {regime.name: regime for regime in REGIMES}
COST = read_costs(COSTS.read_text())


def test_without_drafts_a_step_makes_one_token_per_request() -> None:
    cost, workload = COST["memory_bound"], Workload.draw(2000, 0)
    trace = simulate(FixedLength(0), REGIME["0.85"], cost, workload, concurrency=4)
    assert trace.tokens == [4.0] * len(trace.tokens)
    # The drafter's pass runs whatever is asked for.
    first = StepFeatures(4, int(workload.prompts[:4].sum()), 4, 1, 4)
    assert trace.time(cost).milliseconds[0] == pytest.approx(cost.measure(first))
    without = trace.without_drafter().time(cost).milliseconds[0]
    assert without == pytest.approx(cost.measure(first._replace(passes=0, drafted=0)))
    drafted = simulate(FixedLength(1), REGIME["0.85"], cost, workload, concurrency=4)
    with pytest.raises(ValueError, match="a trace with drafts needs its drafter"):
        drafted.without_drafter()


def test_drafts_are_made_in_one_step_and_verified_in_the_next() -> None:
    chances = Regime("certain", [(0.0, [np.ones(K_MAX)])])
    trace = simulate(FixedLength(3), chances, COST["memory_bound"], Workload.draw(500, 0), concurrency=1)
    assert trace.tokens[:3] == [1.0, 4.0, 4.0]
    assert [features.tokens for features in trace.features[:3]] == [1, 4, 4]
    assert {features.passes for features in trace.features} == {3}


def test_a_lookup_finds_something_at_some_places_of_the_text() -> None:
    workload = Workload.draw(4000, 0)
    shares = []
    for matches in (0.2, 0.7):
        regime = Regime("few", [(0.0, [np.full(K_MAX, 0.01)])], matches)
        trace = simulate(FixedLength(1), regime, COST["lookup"], workload, concurrency=4)
        verified = [features.tokens - features.requests for features in trace.features]
        shares.append(np.mean(verified) / 4)
        assert {features.drafted for features in trace.features} == {4}
    assert shares == pytest.approx([0.2, 0.7], abs=0.04)


def test_a_policy_is_told_of_a_step_after_the_next_one_is_planned() -> None:
    events: list[tuple[str, int, bool]] = []

    class Spy(FixedLength):
        def trim(self, batch: Batch, given: np.ndarray, is_probe: bool, truth: Truth) -> np.ndarray:
            events.append(("trim", int(given[0]), is_probe))
            return given

        def plan(self, batch: Batch, truth: Truth) -> Plan:
            self.length += 1
            events.append(("plan", self.length, self.length == 2))
            return Plan(np.full(len(batch.request_ids), self.length), self.length == 2)

        def observe(self, observation: Observation) -> None:
            events.append(("observe", int(observation.drafted[0]), observation.is_probe))

    regime = Regime("never", [(0.0, [np.zeros(K_MAX)])])
    workload = Workload(np.array([4, 1]), np.array([10, 10]), np.zeros(5))
    simulate(Spy(0), regime, COST["memory_bound"], workload, concurrency=1)
    assert events[:9] == [
        ("plan", 1, False),
        ("observe", 0, False),
        ("trim", 1, False),
        ("plan", 2, True),
        ("observe", 1, False),
        ("trim", 2, True),
        ("plan", 3, False),
        ("observe", 2, True),
        ("trim", 3, False),
    ]


@pytest.mark.parametrize("name", sorted(COST))
def test_many_steps_take_what_each_takes(name: str) -> None:
    rng = np.random.default_rng(0)
    features = np.stack([rng.integers(1, 400, 50) for _ in StepFeatures._fields], axis=1)
    each = [COST[name].measure(StepFeatures(*row)) for row in features.tolist()]
    assert COST[name].measure_many(features) == pytest.approx(each)


def test_graph_steps_are_padded() -> None:
    cost = COST["graph_steps"]
    times = [cost.measure(StepFeatures(tokens, 0, 1, 0, 0)) for tokens in (5, 8, 9, 300)]
    assert times[0] == times[1] < times[2]
    assert times[3] == pytest.approx(9.0 + 300 * 0.12 + 0.02)


def test_the_prior_is_what_a_sweep_shows() -> None:
    cost = COST["memory_bound"]
    prior, true = measure_prior(cost, 0), cost.coefficients
    for name in ("step", "tokens", "passes"):
        assert prior[name] == pytest.approx(true[name], rel=0.5)
    # No forward pass without context tells what context costs.
    assert prior["context_tokens"] > 5 * true["context_tokens"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {step: 1.0, tokens: 1.0}", "cost a: missing or unknown coefficients"),
        (
            f"a: {json.dumps({**dict.fromkeys(COEFFICIENTS, 1), 'drafter': 'oracle'})}",
            "cost a: drafter 'oracle' must be one of model, lookup",
        ),
    ],
)
def test_costs_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_costs(text)


@pytest.mark.parametrize("regime", ["none", "0.85", "mixed"])
@pytest.mark.parametrize("kind", ["memory_bound", "compute_bound", "graph_steps", "lookup_compute"])
def test_no_fixed_length_beats_the_oracle_by_much(kind: str, regime: str) -> None:
    """The oracle takes one step at a time; over unequal requests a fixed length can come out a little ahead."""
    cost, workload = COST[kind], Workload.draw(1500, 1)

    def serve(policy: FixedLength | Oracle) -> float:
        return simulate(policy, REGIME[regime], cost, workload, concurrency=4).time(cost).measure_goodput()

    oracle = serve(Oracle())
    assert all(serve(FixedLength(length)) < 1.02 * oracle for length in (0, 1, 4, 8))


def test_probes_are_counted() -> None:
    """None where drafts pay all the time; where they never do, all drafts after the first steps are probes."""
    cost, workload = COST["lookup_compute"], Workload.draw(2000, 1)
    traces = {}
    for name in ("none", "0.85"):
        policy = Ours(cost, measure_prior(cost, 0))
        traces[name] = simulate(policy, REGIME[name], cost, workload, concurrency=4)
    assert traces["0.85"].time(cost).probing.sum() == 0
    late = traces["none"].features[100:]
    drafts = sum(features.tokens - features.requests for features in late)
    assert drafts == sum(verified for verified, *_ in traces["none"].probes[100:]) > 0
    assert traces["none"].time(cost).probing.sum() > 0


def test_recovery_ends_where_the_window_ends() -> None:
    regime = Regime("two", [(0.0, [np.ones(1)]), (0.5, [np.ones(1)])])
    progress = np.arange(200) / 200
    oracle = TimedTrace(np.full(200, 2.0), np.ones(200), progress, np.zeros(200))
    assert measure_recovery(oracle, oracle, regime) == RECOVERY_WINDOW
    late = oracle._replace(tokens=np.where((progress >= 0.5) & (progress < 0.65), 1.0, 2.0))
    # Thirty steps at half the goodput: of a window of 20, four may be among them.
    assert measure_recovery(late, oracle, regime) == 30 - 4 + RECOVERY_WINDOW
    never = oracle._replace(tokens=np.where(progress >= 0.5, 1.0, 2.0))
    assert measure_recovery(never, oracle, regime) == 100
    assert measure_recovery(oracle, oracle, REGIME["none"]) is None
    short = TimedTrace(*(values[:110] for values in oracle))
    with pytest.raises(ValueError, match="10 steps from 50% of the work on are too few: serve more tokens"):
        measure_recovery(short, short, regime)


def test_ours_keeps_up_in_a_small_sample() -> None:
    """The whole grid is `python -m bench.speculation`; a large sample of it is below."""
    cells = run_group(Group(REGIME["changing"], 4, {"model": COST["compute_bound"]}, 0), seeds=1, tokens=1000)
    cells |= run_group(Group(REGIME["none"], 4, {"lookup": COST["lookup_compute"]}, 1), seeds=1, tokens=600)
    summary = {name: metric.value for name, metric in summarize(cells).items()}
    assert summary["goodput_vs_oracle_min"] > 0.96
    assert summary["goodput_vs_best_fixed_min"] > 0.96
    assert summary["recovery_steps_max"] <= 100
    assert 0 < summary["probing_share_max"] < 0.03


@pytest.mark.slow
def test_ours_keeps_up() -> None:
    cells = {}
    for seed, (drafter, regimes) in enumerate(
        {"model": ("none", "0.6", "changing"), "lookup": ("none", "mixed", "changing-few")}.items()
    ):
        costs = {name: cost for name, cost in COST.items() if cost.drafter == drafter}
        for name in regimes:
            named = {f"{kind}-{name}": cost for kind, cost in costs.items()}
            cells |= run_group(Group(REGIME[name], 4, named, seed), seeds=2)
    assert len(cells) == 15
    assert all(len(draws) == 2 for draws in cells.values())
    summary = {name: metric.value for name, metric in summarize(cells).items()}
    assert summary["goodput_vs_oracle_mean"] > 0.98
    assert summary["goodput_vs_best_fixed_min"] > 0.97
    assert summary["recovery_steps_max"] <= 100
    assert 0 < summary["probing_share_max"] < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compute_bound", "memory_bound"])
def test_ours_keeps_up_without_a_measured_prior(kind: str) -> None:
    cells = run_group(Group(REGIME["0.3"], 1, {kind: COST[kind]}, 3), seeds=1, has_prior=False)
    assert cells[kind][0].vs_fixed > 0.95
