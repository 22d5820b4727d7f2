# SPDX-License-Identifier: Apache-2.0
"""The controller against its alternatives on a grid of simulated servers.

    python -m bench.speculation [--out DIR] [--quick] [--hold STEPS [--untrimmed]] [--dry]

Every cell is one cost model (with its per-token and drafting costs also 30 % lower and higher), one number of
concurrent requests and one regime of acceptance; outcomes, noise and the measured prior are drawn several times, and
the worst draw counts. Written are one record, case `smartspec_simulated`, with the worst draw of every cell, and a
plot. Simulated: no engine runs, and control takes no time. What is lost where a plan stands for more than one step, as
it does where control would take too much of a short step, is the arm `ours_held_STEPS` of --hold; with --untrimmed
these plans are never trimmed by the newest outcomes, as those with few drafts are not: `ours_held_STEPS_untrimmed`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from bench.speculation.policies import HOLD, FixedLength, Hold, Oracle, Ours, Published, StockTable, measure_prior
from bench.speculation.regimes import REGIMES
from bench.speculation.simulator import DraftPolicy, Regime, TimedTrace, Trace, TrueCost, Workload, read_costs, simulate

CASE = "smartspec_simulated"
COSTS = Path(__file__).parent / "costs.yaml"
SCALES = (0.7, 1.0, 1.3)
CONCURRENCY = (1, 4, 16, 32)
FIXED = (0, 1, 3, 5, 8)
#: Draws of each cell.
SEEDS = 3
#: Tokens of a cell's workload for each concurrent request.
TOKENS = 1500
#: A workload is drawn for at least so many requests at once: one alone has few lengths to average over.
FEWEST = 4
#: Steps over which recovery is looked at, and what share of the oracle's goodput counts as recovered.
RECOVERY_WINDOW, RECOVERED = 20, 0.9


class Cell(NamedTuple):
    """One draw of ours: as a share of the goodput of the oracle, of the best fixed length in the same engine, of an
    engine without a drafter, of the stock table, and of the published method; the share of time that probes took; and
    the most steps that it took to recover after a change, None where nothing changes."""

    vs_oracle: float
    vs_fixed: float
    vs_off: float
    vs_table: float
    vs_published: float
    probing: float
    recovery: int | None


class Group(NamedTuple):
    """Cells with the same requests and outcomes: what asks nothing of the clock takes the same steps in all of them."""

    regime: Regime
    concurrency: int
    #: By name of the cell.
    costs: Mapping[str, TrueCost]
    seed: int


def run_group(
    group: Group, seeds: int = SEEDS, tokens: int = TOKENS, has_prior: bool = True, hold: Hold = HOLD
) -> dict[str, list[Cell]]:
    """Simulate all policies of every cell of a group: the draws by name of the cell."""
    regime, concurrency = group.regime, group.concurrency
    workload = Workload.draw(tokens * max(concurrency, FEWEST), group.seed)

    def run(policy: DraftPolicy, cost: TrueCost, seed: int = 0) -> Trace:
        return simulate(policy, regime, cost, workload, concurrency=concurrency, seed=seed)

    any_cost = next(iter(group.costs.values()))
    fixed = {length: run(FixedLength(length), any_cost) for length in FIXED}
    table = run(StockTable(), any_cost)
    cells: dict[str, list[Cell]] = {}
    for name, cost in group.costs.items():
        timed = {length: trace.time(cost).measure_goodput() for length, trace in fixed.items()}
        oracle = run(Oracle(), cost).time(cost)
        published = run(Published(), cost).time(cost).measure_goodput()
        cells[name] = []
        for seed in range(1000 * group.seed, 1000 * group.seed + seeds):
            prior = measure_prior(cost, seed) if has_prior else None
            ours = run(Ours(cost, prior, hold), cost, seed).time(cost)
            goodput = ours.measure_goodput()
            cells[name].append(
                Cell(
                    goodput / oracle.measure_goodput(),
                    goodput / max(timed.values()),
                    goodput / fixed[0].without_drafter().time(cost).measure_goodput(),
                    goodput / table.time(cost).measure_goodput(),
                    goodput / published,
                    float(ours.probing.sum() / ours.milliseconds.sum()),
                    measure_recovery(ours, oracle, regime),
                )
            )
    return cells


def measure_recovery(ours: TimedTrace, oracle: TimedTrace, regime: Regime) -> int | None:
    """Most steps after a change until `RECOVERY_WINDOW` have had `RECOVERED` of the oracle's goodput in that phase.

    Raises ValueError for a phase that is shorter than the window.
    """
    longest = None
    bounds = [*(first for first, _ in regime.phases), 1.01]
    for start, end in itertools.pairwise(bounds[1:]):
        inside = (oracle.progress >= start) & (oracle.progress < end)
        if inside.sum() < RECOVERY_WINDOW:
            raise ValueError(
                f"{int(inside.sum())} steps from {start:.0%} of the work on are too few: serve more tokens"
            )
        target = RECOVERED * oracle.tokens[inside].sum() / oracle.milliseconds[inside].sum()
        inside = (ours.progress >= start) & (ours.progress < end)
        tokens, milliseconds = (
            np.convolve(values[inside], np.ones(RECOVERY_WINDOW), "valid")
            for values in (ours.tokens, ours.milliseconds)
        )
        reached = np.flatnonzero(tokens >= target * milliseconds)
        steps = int(reached[0]) + RECOVERY_WINDOW if len(reached) else int(inside.sum())
        longest = max(longest or 0, steps)
    return longest


def make_groups(quick: bool) -> list[Group]:
    """All cells; quick: one scale and two batch sizes."""
    costs = read_costs(COSTS.read_text(encoding="utf-8"))
    groups: list[Group] = []
    for concurrency, regime, drafter in itertools.product(
        CONCURRENCY[1:3] if quick else CONCURRENCY, REGIMES, ("model", "lookup")
    ):
        if drafter == "model" and regime.matches < 1:
            continue
        cells = {
            f"{name}-x{scale:g}-c{concurrency}-{regime.name}": cost.scale(scale)
            for name, cost in costs.items()
            for scale in (SCALES[1:2] if quick else SCALES)
            if cost.drafter == drafter
        }
        groups.append(Group(regime, concurrency, cells, len(groups)))
    return groups


def run_grid(quick: bool, hold: Hold = HOLD) -> dict[str, list[Cell]]:
    """The draws of every cell."""
    from rich.console import Console
    from rich.progress import track

    with ProcessPoolExecutor() as processes:
        results = [processes.submit(run_group, group, hold=hold) for group in make_groups(quick)]
        done = [result.result() for result in track(results, "simulate", console=Console(stderr=True))]
    return dict(sorted(itertools.chain.from_iterable(cells.items() for cells in done)))


def summarize(cells: Mapping[str, Sequence[Cell]]) -> dict[str, Metric]:
    """The figures that count. Worst: of all draws of all cells."""
    draws = [cell for each in cells.values() for cell in each]
    oracle, fixed = np.array([cell.vs_oracle for cell in draws]), np.array([cell.vs_fixed for cell in draws])
    off, published = np.array([cell.vs_off for cell in draws]), np.array([cell.vs_published for cell in draws])
    probing = np.array([cell.probing for cell in draws])
    worst = np.array([min(cell.vs_fixed for cell in each) for each in cells.values()])
    typical = np.array([np.mean([cell.vs_fixed for cell in each]) for each in cells.values()])

    def find_recovery(is_few: bool) -> np.ndarray:
        return np.array(
            [
                cell.recovery
                for name, each in cells.items()
                for cell in each
                if cell.recovery is not None and name.endswith("-few") == is_few
            ]
        )

    recovery, few = find_recovery(False), find_recovery(True)
    return {
        "goodput_vs_oracle_mean": Metric(float(oracle.mean()), "ratio", "higher"),
        "goodput_vs_oracle_min": Metric(float(oracle.min()), "ratio", "higher"),
        "goodput_vs_best_fixed_mean": Metric(float(fixed.mean()), "ratio", "higher"),
        "goodput_vs_best_fixed_min": Metric(float(fixed.min()), "ratio", "higher"),
        "cells_below_0.97_of_best_fixed": Metric(float((worst < 0.97).sum()), "cells", "lower"),
        "cells_below_0.97_of_best_fixed_on_average": Metric(float((typical < 0.97).sum()), "cells", "lower"),
        "goodput_vs_no_drafter_min": Metric(float(off.min()), "ratio", "higher"),
        "goodput_vs_published_mean": Metric(float(published.mean()), "ratio", "higher"),
        "goodput_vs_published_min": Metric(float(published.min()), "ratio", "higher"),
        "probing_share_mean": Metric(float(probing.mean()), "ratio", "lower"),
        "probing_share_max": Metric(float(probing.max()), "ratio", "lower"),
        "recovery_steps_max": Metric(float(recovery.max(initial=0)), "steps", "lower"),
        "recovery_steps_median": Metric(float(np.median(recovery)) if len(recovery) else 0.0, "steps", "lower"),
        "recoveries_beyond_100_steps": Metric(float((recovery > 100).sum()), "draws", "lower"),
        "recoveries": Metric(float(len(recovery)), "draws"),
        "recovery_steps_few_matches_max": Metric(float(few.max(initial=0)), "steps", "lower"),
        "recovery_steps_few_matches_median": Metric(float(np.median(few)) if len(few) else 0.0, "steps", "lower"),
        "cells": Metric(float(len(cells)), "cells"),
        "draws_per_cell": Metric(float(len(draws) / len(cells)), "draws"),
    }


def make_record(cells: Mapping[str, Sequence[Cell]], quick: bool, hold: Hold = HOLD) -> Record:
    """One record: the figures that count, and beside them the worst draw of every cell, as ratios."""
    samples = {
        name: {
            "vs_oracle": min(cell.vs_oracle for cell in each),
            "vs_best_fixed": min(cell.vs_fixed for cell in each),
            "vs_stock_table": min(cell.vs_table for cell in each),
            "vs_published": min(cell.vs_published for cell in each),
        }
        for name, each in cells.items()
    }
    settings: dict[str, Any] = {
        "simulated": True,
        "tokens_per_request_slot": TOKENS,
        "draws": SEEDS,
        "quick": quick,
        "hold": hold.steps,
        "trims_held": hold.trims,
        "samples": samples,
    }
    arm = "ours" if hold == HOLD else f"ours_held_{hold.steps}" + ("" if hold.trims else "_untrimmed")
    return Record(CASE, arm, 0, summarize(cells), **describe_environment(), settings=settings)


def draw(cells: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """Distribution of the worst draws of the cells: ours against the oracle, the best fixed length, the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for label, name in (
        ("oracle", "vs_oracle"),
        ("best fixed length of the cell", "vs_fixed"),
        ("table by batch size", "vs_table"),
        ("method as published", "vs_published"),
    ):
        values = [min(getattr(cell, name) for cell in each) for each in cells.values()]
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
    parser.add_argument("--dry", action="store_true", help="print the figures and write nothing")
    parser.add_argument("--hold", type=int, default=1, help="steps that a plan stands for")
    parser.add_argument("--untrimmed", action="store_true", help="such plans are not trimmed")
    options = parser.parse_args(argv)
    if options.hold < 1:
        parser.error(f"--hold must be at least 1 step, got {options.hold}")
    if options.untrimmed and options.hold == 1:
        parser.error("--untrimmed is about plans that stand: give --hold")
    hold = Hold(options.hold, not options.untrimmed)
    cells = run_grid(options.quick, hold)
    record = make_record(cells, options.quick, hold)
    if not options.dry:
        draw(cells, write_record(options.out, record).parent / f"{record.arm}.svg")
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"simulated, {len(cells)} cells")
    for name, metric in summarize(cells).items():
        table.add_row(name, f"{metric.value:.4g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
