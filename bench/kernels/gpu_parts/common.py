# SPDX-License-Identifier: Apache-2.0
"""What the parts of the GPU program share: the time they have, their records, and the plot made of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.records import Metric, Record, describe_environment, hide_all_paths
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu.samples import make_format
from vllm_ext.kernels.gpu.trials import COLD_BYTES, MoeTrial, Timer


class Shape(NamedTuple):
    """Sizes of a MoE layer."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


#: Qwen3-30B-A3B, whose layers are timed; and what the dry run computes in its place.
SHAPE = Shape(128, 8, 2048, 768)
TINY_SHAPE = Shape(2, 1, 128, 128)

#: Repetitions of a timing, arms in turn.
REPETITIONS = 5


@dataclass(frozen=True)
class Context:
    """Where a part runs. deadline: of time.monotonic, after which nothing new is begun."""

    device: torch.device
    is_dry_run: bool
    deadline: float

    @property
    def shape(self) -> Shape:
        """Sizes of the layer that is timed here."""
        return TINY_SHAPE if self.is_dry_run else SHAPE

    def has_time(self) -> bool:
        """Whether something new may begin."""
        return time.monotonic() < self.deadline


@dataclass
class Result:
    """What a part found. needs_cuda: arms that a dry run cannot have; left_out: arms for which time did not suffice;
    shown: the metric of the plot; limit: a line in it."""

    part: str
    shown: str
    limit: float | None = None
    records: list[Record] = field(default_factory=list)
    needs_cuda: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=describe_environment)

    def add(
        self,
        case: str,
        arm: str,
        metrics: Mapping[str, Metric],
        repetition: int = 0,
        error: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep what an arm of a case did."""
        self.records.append(
            Record(
                case=f"gpu_{self.part}_{case}",
                arm=arm,
                repetition=repetition,
                metrics=dict(metrics),
                versions=self.environment["versions"],
                device=self.environment["device"],
                git_hash=self.environment["git_hash"],
                status="failed" if error else "ok",
                error=error,
                settings={"kind": "gpu", "part": self.part, **(settings or {})},
            )
        )

    def to_json(self, is_dry_run: bool) -> dict[str, Any]:
        """The object of the part's file."""
        content = {
            "part": self.part,
            "dry_run": is_dry_run,
            "needs_cuda": self.needs_cuda,
            "left_out": self.left_out,
            "records": [asdict(record) for record in self.records],
        }
        hidden: dict[str, Any] = hide_all_paths(content)
        return hidden


def draw(result: Result, path: Path) -> None:
    """The shown metric of every arm, the median of its repetitions, one panel of bars for all cases."""
    from statistics import median

    from matplotlib.figure import Figure  # without pyplot: no display, no state between figures

    found: dict[tuple[str, str], list[float]] = {}
    unit = ""
    for record in result.records:
        metric = record.metrics.get(result.shown)
        if metric is not None and metric.value is not None:
            unit = metric.unit
            found.setdefault((record.case, record.arm), []).append(metric.value)
    figure = Figure(figsize=(8.0, 1.2 + 0.18 * max(1, len(found))), layout="constrained")
    axes = figure.subplots()
    cases = list(dict.fromkeys(case for case, _ in found))
    colors = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
    for place, ((case, _), values) in enumerate(found.items()):
        axes.barh(place, median(values), color=colors[cases.index(case) % len(colors)], height=0.7)
    labels = [f"{case.removeprefix(f'gpu_{result.part}_')} {arm}" for case, arm in found]
    axes.set_yticks(range(len(found)), labels, fontsize=6)
    axes.invert_yaxis()
    if result.limit is not None:
        axes.axvline(result.limit, color="#333333", linewidth=0.8)
    axes.set_xlabel(f"{result.shown} ({unit})" if unit else result.shown, fontsize=8)
    axes.set_title(f"{result.part}: {len(result.records)} records", fontsize=8)
    figure.savefig(path, dpi=130)


def make_trial(
    context: Context, pairs: list[tuple[BlockFormat, BlockFormat]], num_tokens: int, shape: Shape | None = None
) -> MoeTrial:
    """A layer whose experts have these formats in turn, and tokens for it."""
    experts, top_k, hidden, intermediate = shape or context.shape
    formats = [pairs[expert % len(pairs)] for expert in range(experts)]
    cold_bytes = 0 if context.is_dry_run else COLD_BYTES
    return MoeTrial(formats, hidden, intermediate, num_tokens, top_k, torch.bfloat16, context.device, cold_bytes)


def uniform(bits: int, act_bits: int) -> list[tuple[BlockFormat, BlockFormat]]:
    """The formats of a layer of one width, in groups of 128."""
    block = make_format(bits, act_bits)
    return [(block, block)]


def count_traffic(trial: MoeTrial) -> tuple[float, float]:
    """(bytes, floating-point operations) of a call, the mean over its routings.

    Bytes: weights of the experts that tokens reach, each once, with scales; activations in and out; the intermediate
    written and read, and what the experts' results take on their way to the sum is left out: another way to sum has
    none. Operations: two for each weight and token.
    """
    experts = trial.layer.table.shape[0]
    touched = sum(len(routing.topk_ids.unique()) for routing in trial.routings) / len(trial.routings)
    hidden, intermediate = trial.layer.hidden_size, trial.layer.intermediate_size
    num_tokens = trial.routings[0].x.shape[0]
    weights = touched * trial.layer.arena.numel() / experts
    activations = 2 * (2 * num_tokens * hidden + 2 * trial.num_pairs * intermediate)
    return weights + activations, 2.0 * trial.num_pairs * 3 * hidden * intermediate


def time_arms(
    context: Context,
    result: Result,
    case: str,
    arms: Mapping[str, tuple[Callable[[int], object], int]],
    describe: Mapping[str, Callable[[float], Mapping[str, Metric]]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Time arms in turn, REPETITIONS times each, and keep a record of every repetition; returns the seconds by arm.

    arms: {name: (run(index), copies)}; describe: {name: further metrics from the seconds of a call}. An arm that
    raises is a failed record, and the others go on.
    """
    timers: dict[str, Timer] = {}
    seconds: dict[str, list[float]] = {}
    for arm, (run, copies) in arms.items():
        try:
            timers[arm] = Timer(run, copies, context.device)
        except Exception as error:  # noqa: BLE001 - the arms are other people's kernels, too
            result.add(case, arm, {}, error=f"{type(error).__name__}: {error}", settings=settings)
    for repetition in range(1 if context.is_dry_run else REPETITIONS):
        order = list(timers) if repetition % 2 == 0 else list(reversed(timers))
        for arm in order:
            measured = timers[arm].measure()
            seconds.setdefault(arm, []).append(measured)
            further = describe[arm](measured) if describe and arm in describe else {}
            metrics = {"latency": Metric(measured * 1e6, "us", "lower"), **further}
            result.add(case, arm, metrics, repetition, settings={**(settings or {}), "stock_arm": next(iter(arms))})
    return seconds
