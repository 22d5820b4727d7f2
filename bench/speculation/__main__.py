# SPDX-License-Identifier: Apache-2.0
"""The controller against its alternatives on a grid of simulated servers.

    python -m bench.speculation [--out DIR] [--quick]

Every cell is one cost model (with its per-token and drafting costs also 30 % lower and higher), one number of
concurrent requests and one regime of acceptance. Written are one record, case `smartspec_simulated`, whose metrics are
the cells, and a plot. Simulated: no engine runs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from bench.speculation.policies import FixedLength, Oracle, Ours, Published, StockTable
from bench.speculation.regimes import REGIMES
from bench.speculation.simulator import DraftPolicy, Regime, Trace, TrueCost, Workload, read_costs, simulate

CASE = "smartspec_simulated"
COSTS = Path(__file__).parent / "costs.yaml"
SCALES = (0.7, 1.0, 1.3)
CONCURRENCY = (1, 4, 16, 32)
FIXED = (0, 1, 3, 5, 8)
#: Tokens of a cell's workload for each concurrent request.
TOKENS = 1500
#: A workload is drawn for at least so many requests at once: one alone has few lengths to average over.
FEWEST = 4
#: How far what an earlier engine stored may be from the truth: standard deviation of its log.
PRIOR_ERROR = 0.4
#: Steps over which recovery is looked at, and what share of the oracle's goodput counts as recovered.
RECOVERY_WINDOW, RECOVERED = 20, 0.9
#: Metrics of the record before those of the cells.
NUM_SUMMARY = 10


class Cell(NamedTuple):
    """Ours as a share of the goodput of the oracle, of the best fixed length, of the stock table, and of the published
    method; and the most steps that it took to recover after a change, None where nothing changes."""

    name: str
    vs_oracle: float
    vs_fixed: float
    vs_table: float
    vs_published: float
    recovery: int | None


def run_cell(name: str, cost: TrueCost, regime: Regime, concurrency: int, passes_per_draft: int, seed: int) -> Cell:
    """Simulate all policies of one cell on the same workload."""
    workload = Workload.draw(TOKENS * max(concurrency, FEWEST), seed)
    rng = np.random.default_rng(seed)
    prior = {key: value * float(rng.lognormal(0, PRIOR_ERROR)) for key, value in cost.coefficients.items()}

    def run(policy: DraftPolicy) -> Trace:
        return simulate(
            policy,
            regime,
            cost,
            workload,
            concurrency=concurrency,
            seed=seed,
            passes_per_draft=passes_per_draft,
        )

    ours = run(Ours(passes_per_draft, cost.graph_sizes, prior))
    oracle = run(Oracle(passes_per_draft))
    best = max(run(FixedLength(length)).measure_goodput() for length in FIXED)
    goodput = ours.measure_goodput()
    return Cell(
        name,
        goodput / oracle.measure_goodput(),
        goodput / best,
        goodput / run(StockTable()).measure_goodput(),
        goodput / run(Published(passes_per_draft)).measure_goodput(),
        measure_recovery(ours, oracle, regime),
    )


def measure_recovery(ours: Trace, oracle: Trace, regime: Regime) -> int | None:
    """Most steps after a change until goodput is back at `RECOVERED` of what the oracle has in that phase."""
    longest = None
    bounds = [*(first for first, _ in regime.phases), 1.01]
    for start, end in itertools.pairwise(bounds[1:]):
        reached = find_steps(oracle, start, end)
        target = RECOVERED * oracle.measure_goodput(reached[0], reached[-1] + 1)
        steps = find_steps(ours, start, end)
        waited = len(steps)
        for index in range(len(steps) - RECOVERY_WINDOW):
            first = steps[index]
            if ours.measure_goodput(first, first + RECOVERY_WINDOW) >= target:
                waited = index
                break
        longest = max(longest or 0, waited)
    return longest


def find_steps(trace: Trace, start: float, end: float) -> list[int]:
    """Steps that began in a phase."""
    return [step for step, progress in enumerate(trace.progress) if start <= progress < end]


def run_grid(quick: bool) -> list[Cell]:
    """All cells; quick: one scale and two batch sizes."""
    from rich.console import Console
    from rich.progress import track

    costs = read_costs(COSTS.read_text(encoding="utf-8"))
    tasks = [
        (f"{name}-x{scale:g}-c{concurrency}-{regime.name}", cost.scale(scale), regime, concurrency, name)
        for name, cost in costs.items()
        for scale in (SCALES[1:2] if quick else SCALES)
        for concurrency in (CONCURRENCY[1:3] if quick else CONCURRENCY)
        for regime in REGIMES
    ]
    with ProcessPoolExecutor() as processes:
        cells = [
            processes.submit(run_cell, name, cost, regime, concurrency, 0 if kind == "lookup" else 1, seed)
            for seed, (name, cost, regime, concurrency, kind) in enumerate(tasks)
        ]
        return [cell.result() for cell in track(cells, "simulate", console=Console(stderr=True))]


def make_record(cells: Sequence[Cell], quick: bool) -> Record:
    """One record: the figures that count, then every cell."""
    oracle, fixed = np.array([cell.vs_oracle for cell in cells]), np.array([cell.vs_fixed for cell in cells])
    published = np.array([cell.vs_published for cell in cells])
    recovery = [cell.recovery for cell in cells if cell.recovery is not None]
    metrics = {
        "goodput_vs_oracle_mean": Metric(float(oracle.mean()), "ratio", "higher"),
        "goodput_vs_oracle_min": Metric(float(oracle.min()), "ratio", "higher"),
        "goodput_vs_best_fixed_min": Metric(float(fixed.min()), "ratio", "higher"),
        "cells_below_0.97_of_best_fixed": Metric(float((fixed < 0.97).sum()), "cells", "lower"),
        "goodput_vs_best_fixed_mean": Metric(float(fixed.mean()), "ratio", "higher"),
        "goodput_vs_published_mean": Metric(float(published.mean()), "ratio", "higher"),
        "goodput_vs_published_min": Metric(float(published.min()), "ratio", "higher"),
        "cells": Metric(float(len(cells)), "cells"),
        "recovery_steps_max": Metric(float(max(recovery)), "steps", "lower"),
        "recovery_steps_median": Metric(float(np.median(recovery)), "steps", "lower"),
    }
    for cell in cells:
        metrics[f"{cell.name}:vs_oracle"] = Metric(cell.vs_oracle, "ratio", "higher")
        metrics[f"{cell.name}:vs_best_fixed"] = Metric(cell.vs_fixed, "ratio", "higher")
        metrics[f"{cell.name}:vs_stock_table"] = Metric(cell.vs_table, "ratio", "higher")
        metrics[f"{cell.name}:vs_published"] = Metric(cell.vs_published, "ratio", "higher")
    settings = {"simulated": True, "tokens_per_request_slot": TOKENS, "prior_error": PRIOR_ERROR, "quick": quick}
    return Record(CASE, "ours", 0, metrics, **describe_environment(), settings=settings)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Distribution of the cells: ours against the oracle, the best fixed length and the stock table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for label, values in (
        ("oracle", [cell.vs_oracle for cell in cells]),
        ("best fixed length of the cell", [cell.vs_fixed for cell in cells]),
        ("table by batch size", [cell.vs_table for cell in cells]),
        ("method as published", [cell.vs_published for cell in cells]),
    ):
        axis.plot(np.sort(values), np.linspace(0, 1, len(values)), label=f"ours / {label}")
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set(xlabel="goodput ratio", ylabel="share of cells", title=f"{len(cells)} simulated servers", xlim=(0.85, 1.6))
    axis.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="one scale of costs and two batch sizes")
    options = parser.parse_args(argv)
    cells = run_grid(options.quick)
    record = make_record(cells, options.quick)
    path = write_record(options.out, record)
    draw(cells, path.parent / "ours.svg")
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"simulated, {len(cells)} cells")
    for name, metric in list(record.metrics.items())[:NUM_SUMMARY]:
        table.add_row(name, f"{metric.value:.4g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
