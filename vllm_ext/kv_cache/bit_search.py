# SPDX-License-Identifier: Apache-2.0
"""Bits of K and V for every layer: which layers need more, and what a budget of bits buys.

    errors      of each layer's attention output, for every pair of K and V bits, on text
    weights     of layers: how much of such an error reaches the model's output
    front       for every budget the pairs with the least weighted error; of all layers the same, beside it
    choice      the plan within the budget; the uniform one where the text says that it is better

Source: KVTuner (arXiv:2502.04420) prunes pairs per layer by the error of attention outputs, clusters layers, and
searches with the model's score in the loop. Here one measured weight per layer makes errors of layers comparable, which
turns the search into a knapsack that is solved for all budgets; the model judges the result.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_ext.compress.allocation import allocate
from vllm_ext.compress.calibration import CalibrationError
from vllm_ext.compress.figures import open_figure
from vllm_ext.compress.progress import track
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import bits_per_element
from vllm_ext.kv_cache.calibrate import Task, check_context, record_passes
from vllm_ext.kv_cache.calibrate_attention import (
    AttentionLayer,
    Recorded,
    attend,
    make_cache_handler,
    mark_full_precision,
    read_back,
    run_model,
    score,
)
from vllm_ext.kv_cache.presets import PLAN_BITS, Preset, get_preset

#: Windows that errors are measured on: attention of all pairs takes longer than the model.
ERROR_WINDOWS = 4
#: Windows, and tokens of them, that the model's outputs are compared on.
MODEL_WINDOWS, MODEL_TOKENS = 2, 512
#: With which a layer's weight is measured: coarse enough to be seen at the output.
WEIGHT_PAIR = "k2v2"
#: Uniform plans that the model judges too.
UNIFORM_PAIRS = ("k2v2", "k3v3", "k4v4", "k8v8")
#: Budgets of the front, evenly spaced between the least and the most bits.
NUM_BUDGETS = 24


class FrontPoint(NamedTuple):
    """kind: "mixed" or the pair of all layers. bits: true bits of an element. error: weighted, summed over layers.

    divergence: KL from the unquantized model in nats per token, None where it was not measured.
    """

    kind: str
    bits: float
    error: float
    divergence: float | None = None


@dataclass(frozen=True)
class BitPlan:
    """pairs: of every layer, in order. chosen: "mixed", or the uniform pair that the text found better."""

    pairs: tuple[str, ...]
    chosen: str
    bits: float
    error: float
    divergence: float
    front: tuple[FrontPoint, ...]
    weights: tuple[float, ...]
    pruned: tuple[int, ...]

    def to_layer_bits(self) -> dict[str, str]:
        """`kv_cache.layer_bits`: neighbours of equal bits share a key."""
        bits: dict[str, str] = {}
        start = 0
        for layer in range(1, len(self.pairs) + 1):
            if layer == len(self.pairs) or self.pairs[layer] != self.pairs[start]:
                bits[str(start) if layer - 1 == start else f"{start}-{layer - 1}"] = self.pairs[start]
                start = layer
        return bits

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        values["front"] = [point._asdict() for point in self.front]
        return {**values, "layer_bits": self.to_layer_bits()}


def list_pairs(head_dim: int) -> dict[str, Preset]:
    """Every pair of K and V bits whose codes fill bytes at this head size, fitted; k8v8 always does."""
    pairs: dict[str, Preset] = {}
    for key in PLAN_BITS:
        for value in PLAN_BITS:
            try:
                pairs[f"k{key}v{value}"] = get_preset(f"k{key}v{value}").fit(head_dim)
            except ValueError:
                # Not for this head size: 7 channels of 3 bits are no whole bytes.
                continue
    return pairs


def search_bits(task: Task, budget: float, *, progress: bool = False) -> BitPlan:
    """Choose bits for every layer of a model, of at most `budget` true bits of an element on average.

    Errors are measured on held-out text of the task. Raises CalibrationError for a budget that no plan meets.
    """
    pairs = list_pairs(task.head_dim)
    names = list(pairs)
    sizes = np.array([count_eighths(preset, task.head_dim) for preset in pairs.values()], np.int64)
    limit = int(budget * 2 * task.head_dim)
    if limit < sizes.min():
        least = float(sizes.min()) / (2 * task.head_dim)
        raise CalibrationError(
            f"{budget} bits of an element are out of reach: the least is {least:g} with {names[int(sizes.argmin())]}"
        )
    check_context(task, pairs[names[0]])
    windows = task.held_out
    recorded = record_passes(task, windows[:ERROR_WINDOWS])
    errors = np.array(
        [measure_pairs(layer, one, pairs) for layer, one in track(recorded, "bits: errors", len(task.layers), progress)]
    )
    judge = Judge(task, windows[:MODEL_WINDOWS])
    layers = [layer.name for layer in task.layers]
    reference = names.index(WEIGHT_PAIR) if WEIGHT_PAIR in pairs else int(sizes.argmin())
    weights = []
    for row, name in enumerate(track(layers, "bits: weights", len(layers), progress)):
        divergence = judge.measure({name: pairs[names[reference]]})
        weights.append(divergence / max(float(errors[row, reference]), 1e-12))
    costs = errors * np.array(weights)[:, None]
    pruned = [prune_pairs(row, sizes) for row in costs]
    return _choose(pairs, costs, sizes, pruned, limit, weights, judge, layers, progress)


def count_eighths(preset: Preset, head_dim: int) -> int:
    """Stored bits of a token of one head, K and V together, all included."""
    return round(head_dim * (bits_per_element(preset.key, head_dim) + bits_per_element(preset.value, head_dim)))


def measure_pairs(layer: AttentionLayer, recorded: Recorded, pairs: Mapping[str, Preset]) -> list[float]:
    """Relative squared error of a layer's attention output for every pair, sinks and window in full precision."""
    wrong, norm = np.zeros(len(pairs)), 0.0
    # A pair reads K as any other pair of the same K bits and clips does.
    keys = list(dict.fromkeys((preset.key, preset.clips) for preset in pairs.values()))
    sides = list(dict.fromkeys((preset.value, preset.clips) for preset in pairs.values()))
    for query, key, value in zip(*recorded, strict=True):
        is_full = mark_full_precision(len(key), next(iter(pairs.values())))
        exact = score(query, key, layer.scaling)
        plain = attend(exact, exact, value, value.float(), is_full)
        norm += float(plain.square().sum())
        scores = {one: score(query, read_back(key, one[0], CodecTensors(), one[1]), layer.scaling) for one in keys}
        values = {one: read_back(value, one[0], CodecTensors(), one[1]) for one in sides}
        for column, preset in enumerate(pairs.values()):
            read = scores[preset.key, preset.clips], value, values[preset.value, preset.clips]
            out = attend(exact, *read, is_full)
            wrong[column] += float((out - plain).square().sum())
    return (wrong / max(norm, 1e-30)).tolist()


def prune_pairs(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Indices of the pairs of one layer that no other beats in both error and bits, by bits.

    costs: float64 [pairs]; sizes: int64 [pairs]. Of equal pairs the first stays.
    """
    kept: list[int] = []
    best = np.inf
    for index in np.lexsort((np.arange(len(costs)), costs, sizes)).tolist():
        if costs[index] < best:
            kept.append(index)
            best = float(costs[index])
    return np.array(kept)


class Judge:
    """How far the model's predictions are from the unquantized model's, on windows of text."""

    def __init__(self, task: Task, windows: torch.Tensor) -> None:
        self._task, self._windows, self.head_dim = task, windows, task.head_dim
        tokens = windows.shape[1]
        # Late positions: most of what they read lies behind the window.
        self._places = torch.linspace(tokens // 2, tokens - 1, min(MODEL_TOKENS, tokens // 2)).long().unique()
        self._exact = self._predict({})

    def measure(self, presets: Mapping[str, Preset]) -> float:
        """KL divergence in nats per token with these layers, by module name, read from quantized pages."""
        read = self._predict(presets)
        return max(0.0, float((self._exact.exp() * (self._exact - read)).sum(-1).mean()))

    def _predict(self, presets: Mapping[str, Preset]) -> torch.Tensor:
        every: dict[str, Preset | None] = {layer.name: presets.get(layer.name) for layer in self._task.layers}
        handler, rows = make_cache_handler(self._task.model, every), []
        for window in self._windows.split(1):
            logits = run_model(self._task.model, window, handler, logits=True)
            assert logits is not None
            rows.append(logits[0, self._places].log_softmax(-1))
        return torch.cat(rows)


def _choose(
    pairs: Mapping[str, Preset],
    costs: np.ndarray,
    sizes: np.ndarray,
    pruned: Sequence[np.ndarray],
    limit: int,
    weights: Sequence[float],
    judge: Judge,
    layers: Sequence[str],
    progress: bool,
) -> BitPlan:
    names, rows = list(pairs), np.arange(len(costs))
    allowed = np.full(costs.shape, np.inf)
    for row, kept in enumerate(pruned):
        allowed[row, kept] = costs[row, kept]
    table = np.broadcast_to(sizes, costs.shape)
    per_bit = 1 / (len(costs) * 2 * judge.head_dim)

    def describe(kind: str, choice: np.ndarray) -> FrontPoint:
        return FrontPoint(kind, float(table[rows, choice].sum() * per_bit), float(costs[rows, choice].sum()))

    most = max(limit * len(costs), int(sizes.min()) * len(costs))
    choice = allocate(allowed, table, most).choice
    budgets = np.linspace(sizes.min(), sizes.max(), NUM_BUDGETS) * len(costs)
    mixed = {describe("mixed", allocate(allowed, table, int(size)).choice) for size in budgets}
    uniform = {name: describe(name, np.full(len(costs), index)) for index, name in enumerate(names)}
    plan = describe("mixed", choice)
    fitting = [name for index, name in enumerate(names) if sizes[index] <= limit]
    # The uniform plan to beat is the best of those within the budget, by the same errors.
    best = min(fitting, key=lambda name: uniform[name].error)
    measured: dict[str, float] = {}
    wanted = list(dict.fromkeys(["mixed", best, *(name for name in UNIFORM_PAIRS if name in pairs)]))
    for kind in track(wanted, "bits: comparing", len(wanted), progress):
        presets = {layer: pairs[names[choice[row]] if kind == "mixed" else kind] for row, layer in enumerate(layers)}
        measured[kind] = judge.measure(presets)
    points = [point._replace(divergence=measured.get(point.kind)) for point in uniform.values()]
    points += [point for point in mixed if point != plan] + [plan._replace(divergence=measured["mixed"])]
    chosen = "mixed" if measured["mixed"] <= measured[best] else best
    final = plan if chosen == "mixed" else uniform[best]
    return BitPlan(
        pairs=tuple(names[index] for index in choice) if chosen == "mixed" else (best,) * len(costs),
        chosen=chosen,
        bits=final.bits,
        error=final.error,
        divergence=measured[chosen],
        front=tuple(sorted(points, key=lambda point: (point.bits, point.kind, point.error))),
        weights=tuple(weights),
        pruned=tuple(len(kept) for kept in pruned),
    )


def write_front(path: Path, plan: BitPlan) -> None:
    """The front as CSV, in one step: kind, bits, error, divergence (empty where it was not measured)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FrontPoint._fields)
    writer.writerows(["" if value is None else value for value in point] for point in plan.front)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all. Raises OSError where the disk does."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plot_front(path: Path, plan: BitPlan) -> None:
    """Error and measured divergence over bits, as PNG. Raises as `figures.open_figure`."""
    mixed = [point for point in plan.front if point.kind == "mixed"]
    uniform = [point for point in plan.front if point.kind != "mixed"]
    with open_figure(path, width=9.0, height=3.8) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([p.bits for p in mixed], [p.error for p in mixed], ".-", label="bits by layer")
        left.plot([p.bits for p in uniform], [p.error for p in uniform], "x", label="one pair for all layers")
        left.set_ylabel("weighted error of attention outputs")
        for points, style, label in ((mixed, "o", "bits by layer"), (uniform, "x", "one pair for all layers")):
            judged = [point for point in points if point.divergence is not None]
            right.plot([p.bits for p in judged], [p.divergence for p in judged], style, label=label)
        right.set_ylabel("KL from the unquantized model, nats per token")
        for axes in (left, right):
            axes.set_yscale("log")
            axes.set_xlabel("true bits per element, window left out")
            axes.grid(alpha=0.3)
            axes.legend()
