# SPDX-License-Identifier: Apache-2.0
"""What the table was made to show: shares of the distance to the unquantized model, from the records of the cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.quality.cells import BF16, BUDGETS, MXMOE_ROWS, TEXTS, UNIFORM_ROWS
from bench.records import Record

REAL_SHAPE = "real_shape"

#: Layers in float32 that quantizing may hold at a time, beside activations.
MAX_LAYERS = 2.5

#: {(arm, text): {seed: mean loss in nats}}.
Losses = Mapping[tuple[str, str], Mapping[int, float]]


class Target(NamedTuple):
    """What was wanted, its value per text (or one under ""), and whether it was reached for all; None: one seed."""

    title: str
    values: dict[str, float]
    unit: str
    met: bool | None
    wanted: str


def read_losses(records: Sequence[Record]) -> dict[tuple[str, str], dict[int, float]]:
    """Log perplexities of the cells that succeeded."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        for text in TEXTS:
            metric = record.metrics.get(f"perplexity_{text}")
            if metric is not None and metric.value is not None:
                losses.setdefault((record.arm, text), {})[record.seed] = math.log(metric.value)
    return losses


def measure_closed(losses: Losses, worse: str, better: str, text: str) -> dict[int, float]:
    """{seed: share of the distance from `worse` to the unquantized model that `better` removes}, for seeds of both."""
    first, second = losses.get((worse, text), {}), losses.get((better, text), {})
    full = losses.get((BF16, text), {}).get(0)
    if full is None:
        return {}
    return {seed: (first[seed] - second[seed]) / (first[seed] - full) for seed in sorted(first.keys() & second.keys())}


def list_targets(losses: Losses, records: Sequence[Record] = ()) -> list[Target]:
    """Every target whose cells are there; values are means over the seeds that all its cells have."""
    found = []
    for title, worse, better, wanted in (
        ("mixing alone, both sides of the same bytes and rounding", "gptaq_2.5", "ours_equal_2.5", 0.20),
        ("ours against uniform GPTQ at 2.25 bits", "gptq_2.25", "ours_2.25", 0.55),
    ):
        closed = {text: list(measure_closed(losses, worse, better, text).values()) for text in TEXTS}
        if all(closed.values()):
            values = {text: 100 * sum(values) / len(values) for text, values in closed.items()}
            met = all(value >= 100 * wanted for value in values.values())
            found.append(Target(f"{title}: gap closed", values, "%", met, f"at least {wanted:.0%}"))
    judged = [_judge_mxmoe(losses, budget.name) for budget in BUDGETS]
    judged += [_judge_uniform(losses, name) for name in ("3.25", "4.25")]
    judged += [judge_memory(record) for record in records if record.arm == REAL_SHAPE]
    return found + [target for target in judged if target is not None]


def judge_memory(record: Record) -> Target:
    """Peak memory at a real model's shapes against that of one layer, activations apart."""
    value = {name: metric.value or 0.0 for name, metric in record.metrics.items()}
    layers = (value["peak_memory"] - value["activations"]) / value["layer_float32"]
    title = "peak memory at real shapes without the activations of one path, in layers of float32"
    return Target(title, {"": layers}, "layers", layers <= MAX_LAYERS, f"at most {MAX_LAYERS}")


def _judge_mxmoe(losses: Losses, budget: str) -> Target | None:
    """Ours against the better of MxMoE's rows, per text: its mean is below theirs by more than either one scatters."""
    arms = [f"{row}_{budget}" for row in (*MXMOE_ROWS, "ours")]
    values, spreads, enough = {}, {}, True
    for text in TEXTS:
        common = _find_common(losses, arms, text)
        if not common:
            return None
        ours = [losses[arms[-1], text][seed] for seed in common]
        others = [[losses[arm, text][seed] for seed in common] for arm in arms[:-1]]
        best = min(others, key=sum)
        values[text] = (sum(best) - sum(ours)) / len(common)
        spreads[text] = max(max(row) - min(row) for row in (best, ours))
        enough = enough and len(common) > 1
    met = all(values[text] > spreads[text] for text in TEXTS) if enough else None
    spread = ", ".join(f"{1e3 * value:.2f}" for value in spreads.values())
    title = f"loss of the better row of MxMoE's allocation above ours at {budget}"
    millis = {text: 1e3 * value for text, value in values.items()}
    return Target(title, millis, "mnats", met, f"above the spread of seeds ({spread})")


def _judge_uniform(losses: Losses, budget: str) -> Target | None:
    """Ours against the better uniform row of each seed: never worse. The value is that of the worst seed."""
    arms = [f"{row}_{budget}" for row in (*UNIFORM_ROWS, "ours")]
    values, enough = {}, True
    for text in TEXTS:
        common = _find_common(losses, arms, text)
        if not common:
            return None
        values[text] = min(
            min(losses[arm, text][seed] for arm in arms[:-1]) - losses[arms[-1], text][seed] for seed in common
        )
        enough = enough and len(common) > 1
    met = all(value >= 0 for value in values.values()) if enough else None
    title = f"loss of the better uniform row above ours at {budget}, in the worst seed"
    return Target(title, {text: 1e3 * value for text, value in values.items()}, "mnats", met, "not below 0")


def _find_common(losses: Losses, arms: Sequence[str], text: str) -> list[int]:
    """Seeds that all the cells have."""
    return sorted(set.intersection(*(set(losses.get((arm, text), {})) for arm in arms)))
