# SPDX-License-Identifier: Apache-2.0
"""From a model and a number of bits to a plan: calibrate, measure, allocate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.compress.allocation import AllocationError, allocate, choose_uniform, measure_range
from vllm_ext.compress.calibration import load_tokenizer, make_windows
from vllm_ext.compress.families import Kind, Module
from vllm_ext.compress.profile import ActivationProfile, load_model, measure_profile
from vllm_ext.compress.sensitivity import Unit, list_units, measure_weight_errors, weigh_by_frequency
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.plan import FORMAT_VERSION, ExpertSchemes, ModuleSchemes, Plan, PlanError
from vllm_ext.quantization.scheme import Scheme


@dataclass(frozen=True)
class PlanReport:
    """A plan and its true bytes.

    quantized_weights, quantized_bytes: of all modules that the plan names. predicted_cost, lower_bound: of the
    allocated blocks, see `allocation.Allocation`; None where the plan was given.
    """

    plan: Plan
    quantized_weights: int
    quantized_bytes: int
    predicted_cost: float | None = None
    lower_bound: float | None = None
    profile: ActivationProfile | None = None

    @property
    def bits_per_weight(self) -> float:
        """8 * stored bytes / weights, scales and zero points included."""
        return 8 * self.quantized_bytes / self.quantized_weights

    def to_json(self) -> dict[str, Any]:
        """The numbers, JSON-ready, without the plan itself."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "quantized_bytes": self.quantized_bytes,
            "quantized_weights": self.quantized_weights,
            "plan_sha256": self.plan.sha256,
            "predicted_cost": self.predicted_cost,
            "lower_bound": self.lower_bound,
        }


def make_plan(
    source: SourceModel,
    *,
    bits: float | None = None,
    schemes: Sequence[Scheme] = (),
    uniform: bool = False,
    calibration: Sequence[str | Path] = (),
    seed: int = 0,
    fixed: Plan | None = None,
    progress: bool = False,
) -> PlanReport:
    """The plan that `vllm-ext quantize` follows.

    bits: true bits per weight of the experts that `fixed` does not name; their schemes are allocated under it, or one
    scheme is chosen for all of them (`uniform`). None: the plan is `fixed` as it is. schemes: the options; default
    one per width. calibration: sources of `calibration.make_windows`; without any, experts count the same.
    fixed: schemes that are given, of linears or of whole layers of experts.
    Raises PlanError, AllocationError, CalibrationError or CheckpointError, each naming the value and the fix.
    """
    plan = fixed or Plan({})
    source.check_plan(plan)
    cost = bound = None
    profile = None
    if bits is not None:
        modules = [m for m in source.modules.values() if m.kind is Kind.EXPERT and m.path not in plan.modules]
        if not modules:
            raise PlanError("no expert is left to allocate bits to: leave out --bits, or experts in the plan")
        units = list_units(modules, schemes)
        sizes = np.stack([unit.sizes for unit in units])
        budget = _check_budget(bits, units, sizes, uniform)
        if calibration:
            profile = profile_source(source, calibration, seed, progress)
        errors = measure_weight_errors(source, units, progress=progress)
        costs = weigh_by_frequency(errors, units, profile, _count_experts(source))
        found = (choose_uniform if uniform else allocate)(costs, sizes, budget)
        cost, bound = found.cost, found.lower_bound
        plan = _merge(source, plan, units, found.choice)
        source.check_plan(plan)
    if not plan.modules:
        raise PlanError("the plan names no module: give --bits, or a plan that names modules")
    weights, stored = _measure_size(source, plan)
    return PlanReport(plan, weights, stored, cost, bound, profile)


def profile_source(
    source: SourceModel, calibration: Sequence[str | Path], seed: int, progress: bool = False
) -> ActivationProfile:
    """The activation profile of a model on calibration text; loads the whole model once."""
    windows = make_windows(calibration, load_tokenizer(source.directory), seed=seed)
    return measure_profile(load_model(source.directory), source.family, windows, progress=progress)


def read_plan(path: Path) -> Plan:
    """A plan file: a `quantization_config` (of which only "plan" is required), or {module path: scheme} alone.

    Raises PlanError naming the file for anything else, and for a plan whose recorded hash is another.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"plan file {path} cannot be read ({error}): give a JSON file") from error
    try:
        if isinstance(value, dict) and "plan" in value:
            plan = Plan.from_config({"quant_method": "mxmoe", "version": FORMAT_VERSION, **value})
            return Plan(plan.modules, plan.ignore)
        return Plan.parse(value)
    except PlanError as error:
        raise PlanError(f"plan file {path}: {error}") from error


def _check_budget(bits: float, units: Sequence[Unit], sizes: np.ndarray, uniform: bool) -> int:
    weights = sum(unit.block.num_weights for unit in units)
    fitting = np.array([[0.0 if option else np.inf for option in unit.options] for unit in units])
    smallest, largest = measure_range(fitting, sizes)
    if uniform and (columns := np.isfinite(fitting).all(axis=0)).any():
        smallest = int(sizes.sum(axis=0)[columns].min())
    low, high = 8 * smallest / weights, 8 * largest / weights
    # One byte of slack: bits that were computed from bytes must reach those bytes again.
    budget = int(bits * weights / 8 + 1e-6)
    if not (np.isfinite(bits) and smallest <= budget) or (bits > high and not uniform):
        names = dict.fromkeys(str(option) for unit in units for option in unit.options if option)
        raise AllocationError(
            f"{bits:g} bits a weight is out of reach: {', '.join(names)} give {low:.4f} to {high:.4f}, "
            f"scales and zero points included"
        )
    return budget


def _count_experts(source: SourceModel) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in source.modules.values():
        if module.kind is Kind.EXPERT:
            layer = module.path.rpartition(".")[0]
            counts[layer] = counts.get(layer, 0) + 1
    return counts


def _merge(source: SourceModel, fixed: Plan, units: Sequence[Unit], choice: np.ndarray) -> Plan:
    """The fixed modules and the chosen ones, in the order of the model."""
    chosen: dict[str, dict[str, Scheme]] = {}
    for unit, option in zip(units, choice, strict=True):
        scheme = unit.options[int(option)]
        assert scheme is not None
        chosen.setdefault(unit.module.path, {})[unit.block.name] = scheme
    modules: dict[str, ModuleSchemes] = {}
    for path in source.modules:
        if path in chosen:
            modules[path] = ExpertSchemes(**chosen[path])
        elif path in fixed.modules:
            modules[path] = fixed.modules[path]
    return Plan(modules, fixed.ignore)


def pair_blocks(module: Module, schemes: ModuleSchemes) -> list[tuple[Any, Scheme]]:
    """(block, its scheme) of a module of a plan."""
    return list(zip(module.blocks, schemes if isinstance(schemes, ExpertSchemes) else (schemes,), strict=True))


def _measure_size(source: SourceModel, plan: Plan) -> tuple[int, int]:
    weights = stored = 0
    for path, schemes in plan.modules.items():
        for block, scheme in pair_blocks(source.modules[path], schemes):
            weights += block.num_weights
            stored += scheme.stored_bytes(block.N, block.K)
    return weights, stored
