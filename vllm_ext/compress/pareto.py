# SPDX-License-Identifier: Apache-2.0
"""The front of predicted loss, time and bytes: what each budget buys, mixed and uniform, as CSV and as a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vllm_ext.compress.allocation import allocate, measure_range
from vllm_ext.compress.figures import open_figure

#: Budgets that are solved, evenly spaced between the smallest and the largest size, beside those of uniform plans.
NUM_BUDGETS = 32


class FrontPoint(NamedTuple):
    """A plan's predictions. kind: "mixed" or the uniform scheme. bits: true bits per weight. time_us: of one batch."""

    kind: str
    bits: float
    bytes: int
    loss: float
    time_us: float


def trace_front(
    losses: np.ndarray,
    times: np.ndarray,
    sizes: np.ndarray,
    num_weights: int,
    names: Sequence[str],
    *,
    time_weight: float = 0.0,
) -> list[FrontPoint]:
    """Mixed plans over all budgets, and every uniform plan; by bytes.

    losses, times: float64 [units, options], loss inf where an option does not fit. sizes: int64 [units, options].
    names: of the options. time_weight: loss that a microsecond is worth to the mixed plans.
    """
    rows = np.arange(len(losses))

    def describe(kind: str, choice: np.ndarray) -> FrontPoint:
        size = int(sizes[rows, choice].sum())
        loss, time = float(losses[rows, choice].sum()), float(times[rows, choice].sum())
        return FrontPoint(kind, 8 * size / num_weights, size, loss, time)

    fitting = np.flatnonzero(np.isfinite(losses).all(axis=0))
    points = [describe(names[option], np.full(len(losses), option)) for option in fitting]
    smallest, largest = measure_range(losses, sizes)
    budgets = {int(budget) for budget in np.linspace(smallest, largest, NUM_BUDGETS)} | {p.bytes for p in points}
    costs = losses if time_weight == 0 else losses + time_weight * np.where(np.isfinite(losses), times, 0.0)
    mixed = {describe("mixed", allocate(costs, sizes, budget).choice) for budget in budgets}
    return sorted([*points, *mixed], key=lambda point: (point.bytes, point.kind))


def write_csv(path: Path, points: Sequence[FrontPoint]) -> None:
    """One row per point. Raises OSError where the file cannot be written."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FrontPoint._fields)
        writer.writerows(points)


def plot_front(path: Path, points: Sequence[FrontPoint], loss_name: str) -> None:
    """Loss over bits on a logarithmic scale, and time over bits, as PNG. Raises as `figures.open_figure`."""
    with open_figure(path, width=9.0, height=3.6) as figure:
        left, right = figure.subplots(1, 2)
        for axes, name in ((left, "loss"), (right, "time_us")):
            mixed = [point for point in points if point.kind == "mixed"]
            uniform = [point for point in points if point.kind != "mixed"]
            axes.plot([p.bits for p in mixed], [getattr(p, name) for p in mixed], "-", label="mixed")
            axes.plot([p.bits for p in uniform], [getattr(p, name) for p in uniform], "x", label="uniform")
            axes.set_xlabel("true bits per weight")
            axes.grid(alpha=0.3)
            axes.legend()
        left.set_yscale("log")
        left.set_ylabel(loss_name)
        right.set_ylabel("predicted microseconds of a batch")
