# SPDX-License-Identifier: Apache-2.0
"""From a model and a number of bits to a plan: calibrate, measure, allocate, and compare with a uniform plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_ext.compress.allocation import AllocationError, choose_uniform, measure_range
from vllm_ext.compress.cache import StageCache, hash_array
from vllm_ext.compress.calibration import NUM_WINDOWS, load_tokenizer, make_windows
from vllm_ext.compress.choosing import Choice, Problem, choose_by_layer, choose_globally, time_choice
from vllm_ext.compress.families import Kind
from vllm_ext.compress.held_out import HELD_OUT_SHARE, Comparison, drop_layers, measure_plans, split_held_out
from vllm_ext.compress.linear_error import has_experts, list_linear_groups
from vllm_ext.compress.measuring import (
    describe_rare_experts,
    describe_shortage,
    find_shares,
    load_profile,
    measure_losses,
    open_cache,
)
from vllm_ext.compress.pareto import trace_front
from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.compress.plan_report import PlanReport, measure_size
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.sensitivity import Unit, list_units
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.time_model import open_time_model, predict_times
from vllm_ext.quantization.plan import ExpertSchemes, ModuleSchemes, Plan, PlanError
from vllm_ext.quantization.scheme import Scheme


def make_plan(
    source: SourceModel,
    *,
    bits: float | None = None,
    schemes: Sequence[Scheme] = (),
    uniform: bool = False,
    calibration: Sequence[str | Path] = (),
    seed: int = 0,
    num_windows: int = NUM_WINDOWS,
    fixed: Plan | None = None,
    rounding: str = "rtn",
    sweeps: int = SWEEPS,
    options: PlanOptions | None = None,
    progress: bool = False,
) -> PlanReport:
    """The plan that `vllm-ext quantize` follows.

    bits: true bits per weight of the experts that `fixed` neither names nor ignores, or, in a model without experts, of
    all linears of the decoder layers that it does not; their schemes are allocated under it, or one scheme is chosen
    for all of them (`uniform`). None: the plan is `fixed` as it is. schemes: the options;
    default one per width, with calibration also smaller groups. calibration: sources of `calibration.make_windows`, of
    which num_windows are taken; without any, experts count the same and weights are all there is to judge by. fixed:
    schemes that are given, of linears or of whole layers of experts. rounding, sweeps: how codes will be chosen, see
    `rounders.make_rounder`; sensitivities and the comparison use them.

    With calibration text a quarter of its windows is held out. A uniform plan and a mixed plan of its bytes are
    measured on them; where mixing does not win, the uniform plan is the result, unless options.force_mixed, and
    unless the options weigh time: such a plan is not made for its loss alone. Where there is nothing to compare, a
    note of the report says why.
    Raises PlanError, AllocationError, CalibrationError, TimeModelError or CheckpointError, each naming the value and
    the fix.
    """
    options = options or PlanOptions()
    plan = fixed or Plan({})
    source.check_plan(plan)
    if bits is None:
        if not plan.modules:
            raise PlanError("the plan names no module: give --bits, or a plan that names modules")
        return PlanReport(plan, *measure_size(source, plan))
    measure = options.measure or ("loss" if calibration else "weight")
    if measure != "weight" and not calibration:
        raise PlanError(f"sensitivity {measure!r} is measured on calibration text: give --calibration, or use 'weight'")
    dense = not has_experts(source)
    if dense:
        modules = list_linear_groups(source, plan)
    else:
        modules = [m for m in source.modules.values() if m.kind is Kind.EXPERT and not plan.names(m.path)]
    if not modules:
        what = "linear" if dense else "expert"
        raise PlanError(
            f"no {what} is left to allocate bits to: leave out --bits, or {what}s in the plan and its ignore"
        )
    units = list_units(modules, schemes, fine=bool(calibration))
    sizes = np.stack([unit.sizes for unit in units])
    budget = _check_budget(bits, units, sizes, uniform)
    model = open_time_model(options.device, options.tables)
    used, held, profile = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64), None
    cache = None
    notes: list[str] = []
    if calibration:
        tokenizer, known = load_tokenizer(source.directory), source.config.get("vocab_size")
        windows = make_windows(calibration, tokenizer, seed=seed, num_windows=num_windows, vocab_size=known)
        notes += describe_shortage(windows, num_windows)
        used, held = split_held_out(windows)
        if options.work is not None:
            cache = open_cache(options.work, source, units, used, measure, rounding, sweeps)
        if not dense:
            profile = load_profile(source, used, cache, progress)
            notes += describe_rare_experts(profile, units)
    losses = measure_losses(source, units, measure, used, profile, rounding, sweeps, cache, progress)
    times = predict_times(
        model,
        [unit.block for unit in units],
        [unit.options for unit in units],
        find_shares(source, units, profile),
        options.batches,
    )
    weights = np.array([unit.block.num_weights for unit in units])
    layers = [unit.module.layer for unit in units]
    # MxMoE adds up norms, where the errors of blocks, being independent, add up in squares.
    judged = np.sqrt(losses) if options.per_layer and measure != "loss" else losses
    problem = Problem(judged, times, sizes, weights, layers)
    alone = _choose_uniform(problem, budget, required=uniform)
    if uniform:
        assert alone is not None
        chosen, kind, comparison = alone, "uniform", None
    else:
        chosen, kind, comparison = _choose_mixed(problem, budget, options), "mixed", None
        if options.compare and (reason := _find_obstacle(alone, held, bool(calibration))):
            notes.append(f"the mixed plan was not compared with a uniform one: {reason}")
        elif options.compare:
            assert alone is not None
            choices = alone, _choose_equal(problem, alone, options), chosen
            comparison = _compare(
                source, plan, units, choices, int(weights.sum()), (used, held), (rounding, sweeps), cache, progress
            )
            # A plan that trades loss for time is not to be judged by its loss.
            if not (comparison.mixed_wins or options.force_mixed or options.weighs_time):
                chosen, kind = alone, "uniform"
    merged = _merge(source, plan, units, chosen.options)
    source.check_plan(merged)
    names = [_name_column(units, option) for option in range(sizes.shape[1])]
    front = trace_front(judged, times[chosen.tile], sizes, int(weights.sum()), names, time_weight=options.time_weight)
    return PlanReport(
        merged,
        *measure_size(source, merged),
        predicted_cost=chosen.loss,
        lower_bound=chosen.lower_bound,
        profile=profile,
        measure=measure,
        predicted_time_us=chosen.time_us if np.isfinite(chosen.time_us) else None,
        tile=model.tiles[chosen.tile],
        chosen=kind,
        comparison=comparison,
        front=tuple(front),
        per_layer=options.per_layer and kind == "mixed",
        notes=tuple(notes),
    )


def _choose_uniform(problem: Problem, budget: int, required: bool) -> Choice | None:
    try:
        return time_choice(problem, choose_uniform(problem.losses, problem.sizes, budget))
    except AllocationError:
        if required:
            raise
        # A budget between the least mixed and the least uniform size: there is nothing to compare with.
        return None


def _choose_mixed(problem: Problem, budget: int, options: PlanOptions) -> Choice:
    if options.per_layer:
        return choose_by_layer(problem, budget, options.exponent)
    return choose_globally(
        problem, budget, time_weight=options.time_weight, max_time_us=options.max_time_us, exact=options.exact
    )


def _choose_equal(problem: Problem, alone: Choice, options: PlanOptions) -> Choice:
    """The mixed choice with the uniform one's bytes; that one itself where its bytes leave no other."""
    try:
        return _choose_mixed(problem, alone.size, options)
    except AllocationError:
        return alone


def _find_obstacle(alone: Choice | None, held: np.ndarray, calibrated: bool) -> str:
    """Why a mixed plan cannot be compared with a uniform one; nothing where it can."""
    if not calibrated:
        return "there is no calibration text to measure both on (--calibration)"
    if not len(held):
        return f"fewer than {HELD_OUT_SHARE} windows of calibration text leave none to hold out"
    return "" if alone is not None else "no single scheme for all blocks fits the budget"


def _compare(
    source: SourceModel,
    fixed: Plan,
    units: Sequence[Unit],
    choices: tuple[Choice, Choice, Choice],
    weights: int,
    windows: tuple[np.ndarray, np.ndarray],
    how: tuple[str, int],
    cache: StageCache | None,
    progress: bool,
) -> Comparison:
    """choices: uniform, mixed at its bytes, mixed. windows: calibrated with, held out. how: rounding and sweeps."""
    rounding, sweeps = how
    plans = [_merge(source, fixed, units, choice.options) for choice in choices]
    distinct = list({plan.sha256: plan for plan in plans}.values())
    key = {
        "held_out": hash_array(windows[1]),
        "rounding": rounding,
        "sweeps": sweeps,
        "plans": [plan.sha256 for plan in distinct],
    }
    name = f"held-out-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    stored = None if cache is None else cache.load(name)
    if stored is None:
        stored = measure_plans(
            source,
            distinct,
            windows[1],
            rounding=rounding,
            sweeps=sweeps,
            calibration=windows[0],
            cache=cache,
            progress=progress,
        )
        if cache is not None:
            cache.store(name, stored)
            drop_layers(source, distinct, cache, rounding=rounding, sweeps=sweeps)
    full, losses = stored
    found = dict(zip([plan.sha256 for plan in distinct], losses, strict=True))
    uniform, equal, mixed = (found[plan.sha256] for plan in plans)
    bits = tuple(8 * choice.size / weights for choice in choices)
    scheme = str(units[0].options[int(choices[0].options[0])])
    return Comparison(int(windows[1].size), full, uniform, equal, mixed, bits[0], bits[1], bits[2], scheme)


def _name_column(units: Sequence[Unit], option: int) -> str:
    """Schemes of one column of options, which differ where groups do not fit every block."""
    return "+".join(dict.fromkeys(str(unit.options[option]) for unit in units if unit.options[option]))


def _check_budget(bits: float, units: Sequence[Unit], sizes: np.ndarray, uniform: bool) -> int:
    if not (np.isfinite(bits) and bits > 0):
        raise AllocationError(f"bits must be a positive number, got {bits:g}")
    weights = sum(unit.block.num_weights for unit in units)
    fitting = np.array([[0.0 if option else np.inf for option in unit.options] for unit in units])
    smallest, largest = measure_range(fitting, sizes)
    if uniform and (columns := np.isfinite(fitting).all(axis=0)).any():
        smallest = int(sizes.sum(axis=0)[columns].min())
    low, high = 8 * smallest / weights, 8 * largest / weights
    # One byte of slack: bits that were computed from bytes must reach those bytes again.
    budget = int(bits * weights / 8 + 1e-6)
    if smallest > budget or (bits > high and not uniform):
        names = dict.fromkeys(str(option) for unit in units for option in unit.options if option)
        raise AllocationError(
            f"{bits:g} bits a weight is out of reach: {', '.join(names)} give {low:.4f} to {high:.4f}, "
            f"scales and zero points included"
        )
    return budget


def _merge(source: SourceModel, fixed: Plan, units: Sequence[Unit], choice: np.ndarray) -> Plan:
    """The fixed modules and the chosen ones, in the order of the model."""
    chosen: dict[str, dict[str, Scheme]] = {}
    linears: dict[str, Scheme] = {}
    for unit, option in zip(units, choice, strict=True):
        scheme = unit.options[int(option)]
        assert scheme is not None
        if unit.module.expert is None:
            linears.update(dict.fromkeys(unit.block.paths, scheme))
        else:
            chosen.setdefault(unit.module.path, {})[unit.block.name] = scheme
    modules: dict[str, ModuleSchemes] = {}
    for path in source.modules:
        if path in chosen:
            modules[path] = ExpertSchemes(**chosen[path])
        elif path in linears:
            modules[path] = linears[path]
        elif path in fixed.modules:
            modules[path] = fixed.modules[path]
    return Plan(modules, fixed.ignore)
