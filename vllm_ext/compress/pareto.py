# SPDX-License-Identifier: Apache-2.0
"""The front of predicted loss, time and bytes: what each budget buys, mixed and uniform, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vllm_ext.compress.allocation import allocate, measure_range
from vllm_ext.compress.figures import open_figure
from vllm_ext.quantization.atomic_directory import write_file

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

    losses, times: float64 [units, options], loss inf where an option does not fit, time inf where it has no kernel.
    sizes: int64 [units, options]. names: of the options. time_weight: loss that a microsecond is worth to the mixed
    plans.
    """
    rows = np.arange(len(losses))

    def describe(kind: str, choice: np.ndarray) -> FrontPoint:
        size = int(sizes[rows, choice].sum())
        loss, time = float(losses[rows, choice].sum()), float(times[rows, choice].sum())
        return FrontPoint(kind, 8 * size / num_weights, size, loss, time)

    fitting = np.flatnonzero(np.isfinite(losses).all(axis=0))
    points = [describe(names[option], np.full(len(losses), option)) for option in fitting]
    costs = losses if time_weight == 0 else losses + time_weight * np.where(np.isfinite(losses), times, 0.0)
    # Of the options that also have a kernel, where time counts.
    smallest, largest = measure_range(costs, sizes)
    budgets = {int(budget) for budget in np.linspace(smallest, largest, NUM_BUDGETS)}
    budgets |= {point.bytes for point in points if point.bytes >= smallest}
    mixed = {describe("mixed", allocate(costs, sizes, budget).choice) for budget in budgets}
    return sorted([*points, *mixed], key=lambda point: (point.bytes, point.kind))


def write_csv(path: Path, points: Sequence[FrontPoint]) -> None:
    """One row per point, in a new file. Raises CheckpointError where it exists, OSError where the disk does."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FrontPoint._fields)
    writer.writerows(points)
    write_file(path, text.getvalue())


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
