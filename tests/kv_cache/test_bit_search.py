# SPDX-License-Identifier: Apache-2.0
"""Bits by layer: the front is what no pair beats, a budget holds, and the model has the last word."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext import cli
from vllm_ext.compress.calibration import CalibrationError
from vllm_ext.kv_cache import bit_search
from vllm_ext.kv_cache.bit_search import BitPlan, FrontPoint, count_eighths, list_pairs, prune_pairs, search_bits
from vllm_ext.kv_cache.calibrate import load_task
from vllm_ext.kv_cache.presets import parse_plan

HEAD_DIM = 64


class FixedJudge:
    """Says what a test wants of every plan; knows a plan by its layers' names."""

    head_dim = HEAD_DIM

    def __init__(self, mixed: float, uniform: float) -> None:
        self._mixed, self._uniform = mixed, uniform

    def measure(self, presets: Any) -> float:
        """One value for a plan of different layers, another for a uniform one."""
        return self._mixed if len({preset.name for preset in presets.values()}) > 1 else self._uniform


def choose(costs: np.ndarray, budget: float, mixed: float = 0.1, uniform: float = 0.2) -> BitPlan:
    pairs = list_pairs(HEAD_DIM)
    sizes = np.array([count_eighths(preset, HEAD_DIM) for preset in pairs.values()])
    judge: Any = FixedJudge(mixed, uniform)
    layers = [str(layer) for layer in range(len(costs))]
    pruned = [prune_pairs(row, sizes) for row in costs]
    return bit_search._choose(
        pairs, costs, sizes, pruned, int(budget * 2 * HEAD_DIM), [1.0] * len(costs), judge, layers, False
    )


def make_costs(weights: list[float], key_share: float = 0.5) -> np.ndarray:
    """Errors that fall by four for every bit, of K and V by their shares."""
    bits = {"15": 1.5, "2": 2.0, "3": 3.0, "4": 4.0, "8": 8.0}
    rows = []
    for name in list_pairs(HEAD_DIM):
        key, value = name[1:].split("v")
        rows.append(key_share * 4.0 ** -bits[key] + (1 - key_share) * 4.0 ** -bits[value])
    return np.outer(weights, rows)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=25))
def test_what_stays_is_what_no_pair_beats(points: list[tuple[float, int]]) -> None:
    costs, sizes = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    kept = prune_pairs(costs, sizes)
    assert (np.diff(sizes[kept]) > 0).all()
    assert (np.diff(costs[kept]) < 0).all()
    for index in range(len(points)):
        assert any(costs[one] <= costs[index] and sizes[one] <= sizes[index] for one in kept)


def test_layers_that_matter_get_more_bits() -> None:
    plan = choose(make_costs([50.0, 1.0, 1.0, 0.02]), 3.4)
    sizes = {name: preset.bits(HEAD_DIM) for name, preset in list_pairs(HEAD_DIM).items()}
    bits = [sizes[pair] for pair in plan.pairs]
    assert plan.chosen == "mixed"
    assert bits[0] > bits[1] >= bits[2] > bits[3]
    assert np.mean(bits) == pytest.approx(plan.bits)
    assert plan.bits <= 3.4
    # Where K is what matters, K gets them.
    plan = choose(make_costs([1.0] * 4, key_share=0.99), 3.4)
    keys, values = zip(*(pair[1:].split("v") for pair in plan.pairs), strict=True)
    assert min(int(key) for key in keys) > 2
    assert max(values) in ("2", "3") or "15" in values


@settings(max_examples=25)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(1.9, 9.0))
def test_a_budget_is_kept_and_the_front_falls(weights: list[float], budget: float) -> None:
    plan = choose(make_costs(weights), budget)
    assert plan.bits <= budget
    mixed = [point for point in plan.front if point.kind == "mixed"]
    for before, after in itertools.pairwise(mixed):
        assert after.error <= before.error * (1 + 1e-9)
    presets = parse_plan(plan.to_layer_bits(), len(weights))
    assert [preset.name for preset in presets] == list(plan.pairs)


def test_the_model_has_the_last_word() -> None:
    costs = make_costs([50.0, 1.0, 0.02])
    assert choose(costs, 3.4, mixed=0.1, uniform=0.2).chosen == "mixed"
    plan = choose(costs, 3.4, mixed=0.2, uniform=0.1)
    assert plan.chosen in list_pairs(HEAD_DIM)
    assert set(plan.pairs) == {plan.chosen}
    assert plan.divergence == 0.1
    assert plan.bits <= 3.4
    judged = {point.kind: point.divergence for point in plan.front if point.divergence is not None}
    assert judged["mixed"] == 0.2
    assert judged["k4v4"] == 0.1


def test_layer_bits_join_neighbours() -> None:
    front = (FrontPoint("mixed", 3.0, 0.1),)
    plan = BitPlan(("k8v8", "k2v2", "k2v2", "k2v2", "k8v8"), "mixed", 3.0, 0.1, 0.0, front, (1.0,), (1,))
    assert plan.to_layer_bits() == {"0": "k8v8", "1-3": "k2v2", "4": "k8v8"}
    assert [preset.name for preset in parse_plan(plan.to_layer_bits(), 5)] == list(plan.pairs)


def test_the_command_writes_plan_and_front(tiny_moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the bench extra brings")
    code = cli.main(
        [
            "calibrate-kv", tiny_moe, "--preset", "kvplan", "--calibration", f"{tiny_moe}/kjv_val.txt", "--bits", "3",
            "--windows", "2", "--context", "192", "--plan", str(tmp_path / "plan.json"),
            "--pareto", str(tmp_path / "front"), "--json",
        ]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    plan = json.loads(captured.out.splitlines()[-1])["plan"]
    assert plan["bits"] <= 3
    assert len(plan["pairs"]) == 5
    assert 0 < plan["divergence"] < 1
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written == {"layer_bits": plan["layer_bits"]}
    assert [preset.name for preset in parse_plan(written["layer_bits"], 5)] == plan["pairs"]
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan["front"])
    judged = {row["kind"]: float(row["divergence"]) for row in rows if row["divergence"]}
    assert judged["k2v2"] > judged["k4v4"] > judged["k8v8"]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "judged on held-out text" in captured.out


def test_budgets_out_of_reach(tiny_moe: str) -> None:
    task = load_task(Path(tiny_moe), ["random"], seed=0, context=192, num_windows=2)
    with pytest.raises(
        CalibrationError, match=r"1\.5 bits of an element are out of reach: the least is 1\.875 with k15v15"
    ):
        search_bits(task, 1.5)
    assert "k3v3" not in list_pairs(7)
    assert "k8v8" in list_pairs(7)


@pytest.mark.slow
def test_mixed_bits_beat_one_pair_for_all(tiny_moe: str) -> None:
    """On the shipped model, at the bits of a uniform plan, by the model's own measure."""
    sources = [Path(tiny_moe) / f"{text}_train.txt" for text in ("kjv", "py")]
    task = load_task(Path(tiny_moe), sources, seed=0, context=512, num_windows=16, dtype="float32")
    plan = search_bits(task, 3.25)
    judged = {point.kind: point.divergence for point in plan.front if point.divergence is not None}
    assert plan.divergence <= min(value for kind, value in judged.items() if kind in ("k2v2", "k3v3"))
    assert plan.bits <= 3.25
