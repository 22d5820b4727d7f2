# SPDX-License-Identifier: Apache-2.0
"""The simulator of two lanes: its numbers are those of its model, and its committed records say what the page says."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.phases.__main__ import main, summarize
from bench.phases.cells import Cell, Rates, find_best, find_rate, serve_ours
from bench.phases.costs import GROUPS, Cost, Work, make_cost, read_costs
from bench.phases.servers import serve_lanes, serve_mixed, serve_separate
from bench.phases.workload import Arrival, Served, draw_arrivals, find_median, measure_attainment
from bench.records import load_records
from vllm_ext.scheduling.phases.controller import Objectives, Split

CONTENT = read_costs()
COST = Cost(
    fixed=10, token=0.1, pair=0, step=20, context=0.001, request=0.1, host=1, saturation=0.5,
    beside_prefill=1.5, beside_decode=1.2, overlap=0.75,
)  # fmt: skip
HALF = Split(0.5, 0.5)


def test_the_published_fit_comes_back_for_its_own_model() -> None:
    cost = make_cost(CONTENT, engine="distserve", host="stock", model="opt-13b", device="a100")
    assert cost.measure_prefill(1000, 1000**2) == pytest.approx(
        Work(0.092647507 * 1000 + 6.474786e-6 * 1e6, 0, 16.456860 + 0.5)
    )
    assert sum(cost.measure_decode(10, 5000)) == pytest.approx(19.934703 + 6.269357e-4 * 5000 + 0.038506977 * 10 + 0.5)


def test_a_smaller_model_and_a_faster_device_cost_less() -> None:
    large = make_cost(CONTENT, engine="distserve", host="stock", model="opt-13b")
    small = make_cost(CONTENT, engine="distserve", host="stock")
    fast = make_cost(CONTENT, engine="distserve", host="stock", device="h200")
    assert small.token / large.token == pytest.approx(8.03 / 12.85)
    assert small.context / large.context == pytest.approx(131072 / 819200)
    assert fast.token / small.token == pytest.approx(312 / 989)
    assert fast.step / small.step == pytest.approx(2.039 / 4.8)
    slower = make_cost(CONTENT, engine="distserve", host="stock", prefill_factor=2.0)
    assert (slower.token, slower.step) == pytest.approx((2 * small.token, small.step))


def test_groups_hold_every_coefficient_once_but_the_smallest() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted([*grouped, "request"]) == sorted(asdict(COST))


def test_scaling_a_group() -> None:
    assert COST.scale("memory", 1.3).step == pytest.approx(26)
    contention = COST.scale("contention", 0.5)
    assert (contention.beside_prefill, contention.overlap) == pytest.approx((1.25, 0.875))


def test_what_lanes_get_of_a_device() -> None:
    assert COST.divide((0.6, 0.4)) == pytest.approx((0.6, 0.4))
    assert COST.divide((1.0, 1.0)) == pytest.approx((0.75, 0.25))
    assert sum(COST.divide((0.9, 0.6))) == pytest.approx(1.0)


def test_slowing_down() -> None:
    work = Work(100, 0, 10)
    assert COST.slow_down(work, 0.5, is_prefill=True, is_beside=False) == pytest.approx(210)
    assert COST.slow_down(work, 0.5, is_prefill=True, is_beside=True) == pytest.approx(250)
    step = Work(0, 20, 2)
    assert COST.slow_down(step, 0.8, is_prefill=False, is_beside=False) == pytest.approx(22)
    assert COST.slow_down(step, 0.25, is_prefill=False, is_beside=True) == pytest.approx(62)


def test_arrivals() -> None:
    kinds = CONTENT["workloads"]["sharegpt"]
    slow, fast = (draw_arrivals(kinds, rate, 4000, 0) for rate in (2.0, 8.0))
    assert [one[1:] for one in slow] == [one[1:] for one in fast]
    assert slow[-1].time == pytest.approx(4 * fast[-1].time)
    assert fast[-1].time == pytest.approx(4000 / 8, rel=0.05)
    assert np.mean([one.prompt for one in slow]) == pytest.approx(755, rel=0.05)
    assert np.mean([one.output for one in slow]) == pytest.approx(200, rel=0.05)
    assert max(one.prompt for one in slow) == 2048
    assert find_median(100, 1e-6, 1000) == pytest.approx(100, rel=1e-3)


def test_one_request_alone() -> None:
    """One prompt of 1000 tokens and 11 tokens of output."""
    [mixed] = serve_mixed([Arrival(1.0, 1000, 11)], COST, 2048)
    [lanes] = serve_lanes([Arrival(1.0, 1000, 11)], COST, split=HALF)
    assert mixed.first_token == lanes.first_token == pytest.approx(1.0 + 0.111)
    steps = sum(20 + 0.001 * (1001 + step) + 0.1 + 1 for step in range(10)) / 1e3
    for one in (mixed, lanes):
        assert one.last_token is not None
        assert one.first_token is not None
        assert one.last_token - one.first_token == pytest.approx(steps)


def test_a_chunked_prompt_beside_a_request_that_decodes() -> None:
    first, second = serve_mixed([Arrival(0.0, 10, 100), Arrival(0.05, 250, 1)], COST, 101)
    assert first.first_token == pytest.approx(0.012)
    # Three steps alone until the prompt is there, then chunks of 100, 100 and 50 beside it.
    begin = 0.012 + sum(20 + 0.001 * (11 + step) + 1.1 for step in range(2)) / 1e3
    chunks = (
        sum(max(10 + 0.1 * (chunk + 1), 20) + 0.001 * (13 + i) + 1.1 for i, chunk in enumerate((100, 100, 50))) / 1e3
    )
    assert second.first_token == pytest.approx(begin + chunks)


def test_separate_batches_stop_decode() -> None:
    first, second = serve_separate([Arrival(0.0, 10, 4), Arrival(0.02, 500, 1)], COST, 2048)
    assert second.first_token == pytest.approx(0.012 + (20 + 0.011 + 1.1 + 10 + 50 + 1) / 1e3)
    assert first.last_token == pytest.approx(0.012 + (3 * 21.1 + 0.011 + 0.012 + 0.013 + 61) / 1e3)


def test_lanes_slow_each_other_down_only_while_both_run() -> None:
    """A prompt comes while another request decodes: both run at half the device until the prompt is computed."""
    first, second = serve_lanes([Arrival(0.0, 10, 200), Arrival(0.1, 1000, 1)], COST, split=HALF)
    assert second.first_token is not None
    # Prefill: 100 ms of compute at half the device, 1.2 times for the other lane, and 11 ms; and the step that was
    # under way had the whole device.
    assert 0.1 + 0.251 <= second.first_token <= 0.1 + 0.251 + 0.0211
    alone = serve_lanes([Arrival(0.0, 10, 200)], COST, split=HALF)[0]
    assert first.last_token is not None
    assert alone.last_token is not None
    # Decode: memory half as fast again for that long, the first of these steps at what it began with.
    slower = 0.251 * (1 - 21.1 / 31.1)
    assert first.last_token - alone.last_token == pytest.approx(slower, rel=0.1)


@pytest.mark.parametrize("way", ["mixed", "separate", "lanes", "ours"])
def test_everyone_is_served_in_order_and_once(way: str) -> None:
    cost = make_cost(CONTENT, engine="distserve", host="stock")
    arrivals = draw_arrivals(CONTENT["workloads"]["sharegpt"], 6.0, 300, 1)
    served = {
        "mixed": partial(serve_mixed, cost=cost, budget=512),
        "separate": partial(serve_separate, cost=cost, budget=2048),
        "lanes": partial(serve_lanes, cost=cost, split=HALF),
        "ours": partial(serve_ours, cost=cost, objectives=Objectives(0.5, 0.05), refuses=False),
    }[way](arrivals)
    firsts = [one.first_token for one in served]
    assert None not in firsts
    assert firsts == sorted(first for first in firsts if first is not None)
    for one in served:
        assert one.first_token is not None
        assert one.last_token is not None
        # Nothing is faster than the device: a prefill alone, and a step for every further token.
        alone = (cost.fixed + cost.token * one.arrival.prompt) / 1e3
        assert one.first_token - one.arrival.time >= alone
        assert one.last_token - one.first_token >= (one.arrival.output - 1) * cost.step / 1e3


def test_who_is_refused_is_late() -> None:
    arrivals = [Arrival(0.0, 5000, 2), *(Arrival(0.001 * number, 100, 2) for number in range(1, 10))]
    served = serve_mixed(arrivals, COST, 512, limit=0)
    assert [one.first_token is None for one in served] == [False, *[True] * 9]
    assert not served[1].meets(Objectives(100, 100))


def test_attainment_counts_the_middle() -> None:
    def make(first: float, per_token: float) -> Served:
        return Served(Arrival(1.0, 10, 11), 1.0 + first, 1.0 + first + 10 * per_token)

    good, late, slow = make(0.1, 0.01), make(0.3, 0.01), make(0.1, 0.03)
    assert measure_attainment([late, *[good] * 6, late, slow, slow], Objectives(0.2, 0.02)) == pytest.approx(6 / 8)


def test_rates_are_found_and_settings_chosen() -> None:
    cell = Cell("cell", CONTENT["workloads"]["sharegpt"], Objectives(0.5, 0.05), (0,))
    cost = make_cost(CONTENT, engine="distserve", host="stock")
    twice = make_cost(CONTENT, engine="distserve", host="stock", prefill_factor=2.0)
    rate, chosen = find_best(
        [("slow", partial(serve_mixed, cost=twice, budget=512)), ("fast", partial(serve_mixed, cost=cost, budget=512))],
        cell,
    )
    assert chosen == "fast"
    assert rate > 1.4 * find_rate(partial(serve_mixed, cost=twice, budget=512), cell)
    for factor, attained in ((0.9, True), (1.15, False)):
        served = serve_mixed(draw_arrivals(cell.kinds, factor * rate, 1000, 0), cost, 512)
        assert (measure_attainment(served, cell.objectives) >= 0.9) == attained


def test_ours_keeps_up_with_the_best_fixed_split() -> None:
    cell = Cell("cell", CONTENT["workloads"]["longbench"], Objectives(0.5, 0.0125), (0,))
    cost = make_cost(CONTENT, engine="distserve", host="lanes", device="h200")
    arrivals = draw_arrivals(cell.kinds, 14.0, 600, 0)
    fixed = [
        measure_attainment(serve_lanes(arrivals, cost, split=Split(tenth / 10, 1 - tenth / 10)), cell.objectives)
        for tenth in range(2, 10)
    ]
    ours = measure_attainment(serve_ours(arrivals, cost, cell.objectives, refuses=False), cell.objectives)
    assert max(fixed) > 0.9 > min(fixed)
    assert ours > max(fixed) - 0.05


def test_summary() -> None:
    rates = [
        Rates(4, 512, 5, 0.5, 4, 8, 5, 10, ),
        Rates(8, 512, 5, 0.5, 4, 8, 5, 5),
    ]  # fmt: skip
    metrics = summarize(rates)
    assert metrics["ours_vs_stock_mean"].value == pytest.approx(2**0.5)
    assert metrics["ours_vs_stock_min"].value == 1.0
    assert metrics["ours_vs_stock_at_goal"].value == 1


def test_an_unknown_part() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reproductions"])
    assert ended.value.code == 2


def test_the_committed_records_reproduce_the_paper(repository: Path) -> None:
    """Within 10 %: what the coefficients marked as calibrated are for."""
    records = {
        record.arm: record
        for record in load_records(repository / "bench" / "results")
        if record.case == "semipd_simulated"
    }
    assert set(records) == {"reproduction", "comparison", "sensitivity"}
    assert all(record.settings["simulated"] is True for record in records.values())
    metrics = records["reproduction"].metrics
    assert metrics["split_vs_unpartitioned"].value == pytest.approx(1.11, rel=0.1)
    assert metrics["split_vs_chunked"].value == pytest.approx(1.55, rel=0.1)
