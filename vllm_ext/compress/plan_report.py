# SPDX-License-Identifier: Apache-2.0
"""What `planning.make_plan` found: a plan, its true bytes, what it is predicted to cost, and what to know about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm_ext.compress.families import Module
from vllm_ext.compress.held_out import Comparison
from vllm_ext.compress.pareto import FrontPoint
from vllm_ext.compress.profile import ActivationProfile
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.plan import ExpertSchemes, ModuleSchemes, Plan
from vllm_ext.quantization.scheme import Scheme


@dataclass(frozen=True)
class PlanReport:
    """A plan and its true bytes.

    quantized_weights, quantized_bytes: of all blocks that the plan quantizes; unquantized_*: of those that it names
    and leaves as they are (w16a16). Of the allocated blocks, None where the
    plan was given: predicted_cost in the unit of `measure` ("loss": nats of mean token loss), lower_bound that no
    choice within the bytes beats (per_layer: none with the same bits in every layer),
    predicted_time_us of a batch and the tile it assumes. chosen: "mixed", "uniform" or "given". comparison: with a
    uniform plan on held-out text, None where there was none. notes: sentences for people, on what was not done or is
    thin: a comparison, calibration text.
    """

    plan: Plan
    quantized_weights: int
    quantized_bytes: int
    unquantized_weights: int = 0
    unquantized_bytes: int = 0
    predicted_cost: float | None = None
    lower_bound: float | None = None
    profile: ActivationProfile | None = None
    measure: str | None = None
    predicted_time_us: float | None = None
    tile: str | None = None
    chosen: str = "given"
    comparison: Comparison | None = None
    front: tuple[FrontPoint, ...] = ()
    per_layer: bool = False
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float | None:
        """True bits of the quantized weights, scales and zero points included; None where there are none."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None

    def describe_size(self) -> str:
        """Bits and bytes in one line; what stays as it is beside what is quantized."""
        bits = "" if self.bits_per_weight is None else f"{self.bits_per_weight:.4f} bits over "
        text = f"{bits}{self.quantized_weights} quantized weights, {self.quantized_bytes} bytes"
        if self.unquantized_weights:
            text += f" (and {self.unquantized_weights} weights left as they are, {self.unquantized_bytes} bytes)"
        return text

    @property
    def gap(self) -> float | None:
        """How much the predicted cost exceeds the lower bound, as a share of the cost."""
        if self.predicted_cost is None or self.lower_bound is None:
            return None
        return (self.predicted_cost - self.lower_bound) / self.predicted_cost if self.predicted_cost > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The numbers, JSON-ready, without the plan itself."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "quantized_bytes": self.quantized_bytes,
            "quantized_weights": self.quantized_weights,
            "unquantized_bytes": self.unquantized_bytes,
            "plan_sha256": self.plan.sha256,
            "chosen": self.chosen,
            "measure": self.measure,
            "predicted_cost": self.predicted_cost,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "predicted_time_us": self.predicted_time_us,
            "tile": self.tile,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "notes": list(self.notes),
        }


def pair_blocks(module: Module, schemes: ModuleSchemes) -> list[tuple[Any, Scheme]]:
    """(block, its scheme) of a module of a plan."""
    return list(zip(module.blocks, schemes if isinstance(schemes, ExpertSchemes) else (schemes,), strict=True))


def measure_size(source: SourceModel, plan: Plan) -> tuple[int, int, int, int]:
    """(weights, bytes) of what the plan quantizes, and of what it names and leaves as it is."""
    weights: Counter[bool] = Counter()
    stored: Counter[bool] = Counter()
    for path, schemes in plan.modules.items():
        for block, scheme in pair_blocks(source.modules[path], schemes):
            weights[scheme.is_quantized] += block.num_weights
            stored[scheme.is_quantized] += scheme.stored_bytes(block.N, block.K, block.itemsize)
    return weights[True], stored[True], weights[False], stored[False]
