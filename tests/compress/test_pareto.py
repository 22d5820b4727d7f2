# SPDX-License-Identifier: Apache-2.0
"""The front holds every uniform plan and no mixed plan that another one beats."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from vllm_ext.compress.pareto import plot_front, trace_front, write_csv


@pytest.mark.parametrize("time_weight", [0.0, 0.1])
def test_options_without_a_kernel(time_weight: float) -> None:
    losses, sizes = np.array([[3.0, 1.0, 0.1], [4.0, 2.0, 0.1]]), np.tile(np.array([100, 200, 300]), (2, 1))
    times = np.tile(np.array([np.inf, 1.0, 2.0]), (2, 1))
    points = trace_front(losses, times, sizes, 600, ["a", "b", "c"], time_weight=time_weight)
    mixed = [point for point in points if point.kind == "mixed"]
    assert max(point.bytes for point in mixed) == 600
    # Where time counts, what has no kernel is in no plan; where it does not, its time is shown as unknown.
    assert min(point.bytes for point in mixed) == (400 if time_weight else 200)
    assert {point.kind for point in points} == {"mixed", "a", "b", "c"}


def test_front(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    losses = generator.lognormal(0, 1, (20, 1)) * np.array([4.0, 1.0, 0.25])
    losses[0, 0] = np.inf
    sizes, times = np.tile(np.array([2, 3, 4]), (20, 1)), np.tile(np.array([1.0, 2.0, 3.0]), (20, 1))
    points = trace_front(losses, times, sizes, 160, ["w2", "w3", "w4"])
    mixed = [point for point in points if point.kind == "mixed"]
    assert [point.kind for point in points if point.kind != "mixed"] == ["w3", "w4"]
    assert all(a.loss >= b.loss and a.bytes <= b.bytes for a, b in itertools.pairwise(mixed))
    for uniform in (point for point in points if point.kind != "mixed"):
        assert min(point.loss for point in mixed if point.bytes <= uniform.bytes) <= uniform.loss
    write_csv(tmp_path / "front.csv", points)
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(points)
    assert float(rows[0]["bits"]) == pytest.approx(points[0].bits)
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the bench extra brings")
    plot_front(tmp_path / "front.png", points, "loss")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
