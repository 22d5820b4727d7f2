# SPDX-License-Identifier: Apache-2.0
"""The highest rate that each way of serving sustains, for one device, workload and pair of objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from bench.phases.costs import Cost, make_cost
from bench.phases.servers import LANE_BUDGET, serve_lanes, serve_mixed, serve_separate
from bench.phases.workload import Arrival, Served, draw_arrivals, measure_attainment
from vllm_ext.scheduling.phases.controller import Objectives, Split, SplitController
from vllm_ext.scheduling.phases.published import PublishedController

#: Requests of a run; rates between which the highest is looked for, and halvings of the ratio: to 4 %.
REQUESTS, RATES, HALVINGS = 1200, (1.0, 64.0), 7
#: Splits of ours, and the fixed ones it is compared with.
SPLITS = tuple(Split(tenth / 10, 1 - tenth / 10) for tenth in range(2, 10))
#: max_num_batched_tokens of stock; the best counts.
BUDGETS = (128, 256, 512, 1024, 2048, 4096)
#: max_num_queued_tokens of stock, as multiples of what can be computed until the first token is due; the best counts.
QUEUES = (0.25, 0.5, 1.0)
#: Windows of the published controller, in decode steps; the paper has none, and the best counts.
WINDOWS = (50, 200)
#: Where shares add up to more than the device: as MPS without percentages.
UNPARTITIONED = Split(1.0, 1.0)

Serve = Callable[[Sequence[Arrival]], list[Served]]


class Cell(NamedTuple):
    """A device and a workload with its objectives, and the seeds of its runs."""

    name: str
    kinds: Sequence[Mapping[str, float]]
    objectives: Objectives
    seeds: tuple[int, ...]


def find_rate(serve: Serve, cell: Cell) -> float:
    """Requests a second up to which the objectives are attained, the geometric mean over the cell's seeds."""
    logs = []
    for seed in cell.seeds:
        low, high = RATES
        for _ in range(HALVINGS):
            rate = math.sqrt(low * high)
            arrivals = draw_arrivals(cell.kinds, rate, REQUESTS, seed)
            if measure_attainment(serve(arrivals), cell.objectives) >= cell.objectives.quantile:
                low = rate
            else:
                high = rate
        logs.append(math.log(low))
    return math.exp(sum(logs) / len(logs))


def find_best(serves: Iterable[tuple[Any, Serve]], cell: Cell) -> tuple[float, Any]:
    """(rate, setting) of the setting that sustains the highest rate."""
    return max((find_rate(serve, cell), setting) for setting, serve in serves)


def serve_ours(arrivals: Sequence[Arrival], cost: Cost, objectives: Objectives, *, refuses: bool) -> list[Served]:
    """Two lanes and our controller, which has seen nothing yet."""
    return serve_lanes(arrivals, cost, SplitController(SPLITS, objectives, refuses=refuses))


def serve_published(
    arrivals: Sequence[Arrival], cost: Cost, objectives: Objectives, window: int, *, full_when_alone: bool
) -> list[Served]:
    """Two lanes and Algorithm 1, which has seen nothing yet."""
    controller = PublishedController(objectives, window=window)
    return serve_lanes(arrivals, cost, controller, full_when_alone=full_when_alone)


def reproduce(
    content: Mapping[str, Any], cell: Cell, group: str | None = None, factor: float = 1.0, *, fast: bool = False
) -> dict[str, float]:
    """Rates of what semi-PD's paper compares, in our model of its machine; group: coefficients times a factor; fast:
    the split, no split and chunked prefill alone.
    """
    lanes = make_cost(content, engine="distserve", host="semi-pd")
    chunked = make_cost(content, engine="distserve", host="vllm-0.6.0", prefill_factor=content["vllm_prefill"])
    if group is not None:
        lanes, chunked = lanes.scale(group, factor), chunked.scale(group, factor)
    # MPS gives a lane its percentage whether the other runs or not.
    fixed = partial(serve_lanes, cost=lanes, controller=None, full_when_alone=False)
    splits = [split for split in SPLITS if split.prefill >= 0.6]
    rates = {
        "chunked": find_rate(partial(serve_mixed, cost=chunked, budget=1024), cell),
        "unpartitioned": find_rate(partial(fixed, split=UNPARTITIONED), cell),
        "split": find_best([(split, partial(fixed, split=split)) for split in splits], cell)[0],
    }
    if fast:
        return rates
    equal = make_cost(content, engine="distserve", host="vllm-0.6.0")
    older = make_cost(content, engine="vllm", host="vllm-0.6.0")
    published = partial(serve_published, cost=lanes, objectives=cell.objectives, full_when_alone=False)
    return rates | {
        "chunked_equal_kernels": find_rate(partial(serve_mixed, cost=equal, budget=1024), cell),
        "chunked_published_fit": find_rate(partial(serve_mixed, cost=older, budget=1024), cell),
        "separate": find_rate(partial(serve_separate, cost=chunked, budget=LANE_BUDGET), cell),
        "published": find_best([(window, partial(published, window=window)) for window in WINDOWS], cell)[0],
    }


class Rates(NamedTuple):
    """Requests a second of each way, and the settings that were best."""

    stock: float
    stock_budget: int
    fixed: float
    fixed_prefill: float
    published: float
    ours: float
    stock_refusing: float
    ours_refusing: float


def list_ways(content: Mapping[str, Any], cell: Cell, device: str, group: str | None, factor: float) -> dict[str, Any]:
    """What is compared: functions that serve arrivals, by name; tunable ones as {setting: function}."""
    stock = make_cost(content, engine="distserve", host="stock", device=device)
    lanes = make_cost(content, engine="distserve", host="lanes", device=device)
    if group is not None:
        stock, lanes = stock.scale(group, factor), lanes.scale(group, factor)
    ours = partial(serve_ours, cost=lanes, objectives=cell.objectives)
    published = partial(serve_published, cost=lanes, objectives=cell.objectives, full_when_alone=True)
    in_time = cell.objectives.ttft * 1e3 / stock.token
    return {
        "stock": {budget: partial(serve_mixed, cost=stock, budget=budget) for budget in BUDGETS},
        "fixed": {split: partial(serve_lanes, cost=lanes, controller=None, split=split) for split in SPLITS[3:]},
        "published": {window: partial(published, window=window) for window in WINDOWS},
        "ours": partial(ours, refuses=False),
        "ours_refusing": partial(ours, refuses=True),
        "stock_refusing": lambda budget: {
            queue: partial(serve_mixed, cost=stock, budget=budget, limit=int(queue * in_time)) for queue in QUEUES
        },
    }


def compare(
    content: Mapping[str, Any],
    cell: Cell,
    device: str,
    group: str | None = None,
    factor: float = 1.0,
    *,
    fast: bool = False,
) -> Rates:
    """Rates of ours and of what it is compared with, on one device; fast: stock and ours alone, the rest is 0."""
    ways = list_ways(content, cell, device, group, factor)
    stock, budget = find_best(ways["stock"].items(), cell)
    ours = find_rate(ways["ours"], cell)
    if fast:
        return Rates(stock, budget, 0, 0, 0, ours, 0, 0)
    fixed, split = find_best(ways["fixed"].items(), cell)
    published, _ = find_best(ways["published"].items(), cell)
    refusing = max(stock, find_best(ways["stock_refusing"](budget).items(), cell)[0])
    return Rates(stock, budget, fixed, split.prefill, published, ours, refusing, find_rate(ways["ours_refusing"], cell))


def draw_curve(
    content: Mapping[str, Any], cell: Cell, device: str, best: Rates, rates: Sequence[float]
) -> dict[str, list[float]]:
    """Attainment of each way, with the setting that was best, at each rate, the mean over the cell's seeds."""
    ways = list_ways(content, cell, device, None, 1.0)
    split = next(split for split in SPLITS if split.prefill == best.fixed_prefill)
    chosen = {
        "stock, best chunk": ways["stock"][best.stock_budget],
        "best fixed split": ways["fixed"][split],
        "Algorithm 1": ways["published"][WINDOWS[0]],
        "ours": ways["ours"],
    }
    return {
        name: [
            sum(
                measure_attainment(serve(draw_arrivals(cell.kinds, rate, REQUESTS, seed)), cell.objectives)
                for seed in cell.seeds
            )
            / len(cell.seeds)
            for rate in rates
        ]
        for name, serve in chosen.items()
    }
