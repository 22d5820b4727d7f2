# SPDX-License-Identifier: Apache-2.0
"""Two lanes against mixed batches, on simulated devices.

    python -m bench.phases [reproduction] [comparison] [sensitivity] [--out DIR] [--jobs N] [--quick]

reproduction: what semi-PD's paper compares, with published coefficients where there are any. comparison: ours against
its Algorithm 1, the best fixed split and stock with its best chunk, all with the same kernels. sensitivity: both with
each group of coefficients 30 % lower and higher. Each writes one record of the case `semipd_simulated`; the comparison
also draws attainment over rate. Simulated: no engine runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.phases.cells import REQUESTS, Cell, Rates, compare, draw_curve, reproduce
from bench.phases.costs import GROUPS, read_costs
from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from vllm_ext.scheduling.phases.controller import Objectives

CASE = "semipd_simulated"
FACTORS = (0.7, 1.3)
SEEDS = (0, 1)
#: Cells whose attainment is drawn over the rate, as parts of the best rate of any way.
CURVES = ("a100-sharegpt-50ms", "h200-longbench-12.5ms")
CURVE_POINTS = tuple(np.linspace(0.3, 1.3, 11).tolist())
#: Times the rate of stock that is the goal.
GOAL = 1.5


def list_published_cells(content: Mapping[str, Any], seeds: tuple[int, ...]) -> list[Cell]:
    """The paper's workloads with its objectives."""
    return [
        Cell(name, content["workloads"][one["workload"]], Objectives(one["ttft"], one["tpot"]), seeds)
        for name, one in content["published_objectives"].items()
    ]


def list_cells(content: Mapping[str, Any], seeds: tuple[int, ...]) -> list[tuple[str, Cell]]:
    """(device, cell) of the comparison."""
    return [
        (
            device,
            Cell(
                f"{device}-{workload}-{tpot * 1e3:g}ms",
                content["workloads"][workload],
                Objectives(one["ttft"], tpot),
                seeds,
            ),
        )
        for device, workloads in content["objectives"].items()
        for workload, one in workloads.items()
        for tpot in one["tpot"]
    ]


def run_all(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], jobs: int, title: str) -> list[Any]:
    """Results of the calls, in their order, over so many processes."""
    from rich.console import Console
    from rich.progress import track

    with ProcessPoolExecutor(jobs) as processes:
        futures = [processes.submit(function, *arguments) for function, arguments in calls]
        return [future.result() for future in track(futures, title, console=Console(stderr=True))]


def average(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def find_paper_ratios(rates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The ratios that the paper has, over its workloads."""
    pairs = {
        "split_vs_unpartitioned": ("split", "unpartitioned"),
        "split_vs_chunked": ("split", "chunked"),
        "split_vs_chunked_equal_kernels": ("split", "chunked_equal_kernels"),
        "split_vs_chunked_published_fit": ("split", "chunked_published_fit"),
        "split_vs_separate": ("split", "separate"),
        "published_vs_unpartitioned": ("published", "unpartitioned"),
        "published_vs_split": ("published", "split"),
    }
    return {
        name: average([one[a] / one[b] for one in rates])
        for name, (a, b) in pairs.items()
        if a in rates[0] and b in rates[0]
    }


def run_reproduction(content: Mapping[str, Any], seeds: tuple[int, ...], jobs: int) -> dict[str, Metric]:
    """Ratios of the paper, then the rate of every way and workload."""
    cells = list_published_cells(content, seeds)
    rates = run_all([(reproduce, (content, cell)) for cell in cells], jobs, "reproduction")
    metrics = {name: Metric(value, "ratio") for name, value in find_paper_ratios(rates).items()}
    for cell, one in zip(cells, rates, strict=True):
        for way, rate in one.items():
            metrics[f"{cell.name}:{way}"] = Metric(rate, "req/s", "higher")
    return metrics


def summarize(rates: Sequence[Rates]) -> dict[str, Metric]:
    """Ours against each of the others, over all cells."""
    metrics = {}
    for name, ratios in {
        "ours_vs_stock": [one.ours / one.stock for one in rates],
        "ours_vs_fixed": [one.ours / one.fixed for one in rates],
        "ours_vs_published": [one.ours / one.published for one in rates],
        "refusing_vs_stock_refusing": [one.ours_refusing / one.stock_refusing for one in rates],
    }.items():
        metrics[f"{name}_mean"] = Metric(average(ratios), "ratio", "higher")
        metrics[f"{name}_min"] = Metric(min(ratios), "ratio", "higher")
        metrics[f"{name}_max"] = Metric(max(ratios), "ratio", "higher")
        metrics[f"{name}_at_goal"] = Metric(float(sum(ratio >= GOAL for ratio in ratios)), "cells", "higher")
    metrics["cells"] = Metric(float(len(rates)), "cells")
    return metrics


def run_comparison(
    content: Mapping[str, Any], seeds: tuple[int, ...], jobs: int
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """(metrics, curves): the summary, then all rates of every cell; attainment by way of the cells of CURVES."""
    cells = list_cells(content, seeds)
    rates = run_all([(compare, (content, cell, device)) for device, cell in cells], jobs, "comparison")
    metrics = summarize(rates)
    for (_, cell), one in zip(cells, rates, strict=True):
        for name, value in one._asdict().items():
            unit = {"stock_budget": "tokens", "fixed_prefill": "share"}.get(name, "req/s")
            metrics[f"{cell.name}:{name}"] = Metric(float(value), unit, "higher" if unit == "req/s" else "none")
        metrics[f"{cell.name}:ours_vs_stock"] = Metric(one.ours / one.stock, "ratio", "higher")
    drawn = [(device, cell, one) for (device, cell), one in zip(cells, rates, strict=True) if cell.name in CURVES]
    axes = [[part * max(one.stock, one.fixed, one.published, one.ours) for part in CURVE_POINTS] for *_, one in drawn]
    curves = run_all(
        [
            (draw_curve, (content, cell, device, one, axis))
            for (device, cell, one), axis in zip(drawn, axes, strict=True)
        ],
        jobs,
        "curves",
    )
    return metrics, {
        cell.name: {"rates": axis, "attainment": curve}
        for (_, cell, _), axis, curve in zip(drawn, axes, curves, strict=True)
    }


def run_sensitivity(content: Mapping[str, Any], jobs: int) -> dict[str, Metric]:
    """Ratios with each group of coefficients lower and higher; one seed, and of the comparison the middle paces."""
    variants = [(group, factor) for group in GROUPS for factor in FACTORS]
    published = list_published_cells(content, SEEDS[:1])
    middle = list_cells(content, SEEDS[:1])[1::3]
    first = run_all(
        [(reproduce_fast, (content, cell, *variant)) for variant in variants for cell in published],
        jobs,
        "reproduction",
    )
    second = run_all(
        [(compare_fast, (content, cell, device, *variant)) for variant in variants for device, cell in middle],
        jobs,
        "comparison",
    )
    metrics: dict[str, Metric] = {}
    for index, (group, factor) in enumerate(variants):
        name = f"{group}-x{factor:g}"
        ratios = find_paper_ratios(first[index * len(published) : (index + 1) * len(published)])
        metrics[f"{name}:split_vs_unpartitioned"] = Metric(ratios["split_vs_unpartitioned"], "ratio")
        metrics[f"{name}:split_vs_chunked"] = Metric(ratios["split_vs_chunked"], "ratio")
        ours = [one.ours / one.stock for one in second[index * len(middle) : (index + 1) * len(middle)]]
        metrics[f"{name}:ours_vs_stock_mean"] = Metric(average(ours), "ratio", "higher")
        metrics[f"{name}:ours_vs_stock_min"] = Metric(min(ours), "ratio", "higher")
    summary = {}
    for ratio in ("split_vs_unpartitioned", "split_vs_chunked", "ours_vs_stock_mean"):
        values = [metric.value for name, metric in metrics.items() if name.endswith(f":{ratio}") and metric.value]
        summary[f"{ratio}_lowest"] = Metric(min(values), "ratio")
        summary[f"{ratio}_highest"] = Metric(max(values), "ratio")
    return summary | metrics


def reproduce_fast(content: Mapping[str, Any], cell: Cell, group: str, factor: float) -> dict[str, float]:
    """The split, no split and chunked prefill alone."""
    return reproduce(content, cell, group, factor, fast=True)


def compare_fast(content: Mapping[str, Any], cell: Cell, device: str, group: str, factor: float) -> Rates:
    """Stock and ours alone."""
    return compare(content, cell, device, group, factor, fast=True)


def draw(curves: Mapping[str, Any], path: Path) -> None:
    """Attainment over rate, a panel for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    # Element names would be random.
    matplotlib.rcParams["svg.hashsalt"] = CASE
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), layout="constrained", squeeze=False)
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=True):
        for way, attainment in curve["attainment"].items():
            axis.plot(curve["rates"], attainment, marker=".", label=way)
        axis.axhline(0.9, color="grey", linewidth=0.8)
        axis.set(xlabel="requests per second", ylabel="share in time", title=f"simulated: {name}", ylim=(0, 1.02))
        axis.legend(loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parts = ("reproduction", "comparison", "sensitivity")
    parser = argparse.ArgumentParser(prog="python -m bench.phases", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(parts)}")
    content = read_costs()
    seeds = SEEDS[:1] if options.quick else SEEDS
    settings = {"simulated": True, "requests": REQUESTS, "quick": options.quick}
    for part in options.parts or parts:
        curves: dict[str, Any] = {}
        if part == "reproduction":
            metrics = run_reproduction(content, seeds, options.jobs)
        elif part == "comparison":
            metrics, curves = run_comparison(content, seeds, options.jobs)
        else:
            metrics = run_sensitivity(content, options.jobs)
        record = Record(
            CASE, part, 0, metrics, **describe_environment(), settings=settings | ({"curves": curves} if curves else {})
        )
        path = write_record(options.out, record)
        if curves:
            draw(curves, path.parent / "attainment.svg")
        report(part, metrics)
    return 0


def report(part: str, metrics: Mapping[str, Metric]) -> None:
    """The summary, which is what comes before the first cell."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"simulated: {part}")
    for name, metric in metrics.items():
        if ":" not in name:
            table.add_row(name, f"{metric.value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
