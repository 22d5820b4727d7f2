# SPDX-License-Identifier: Apache-2.0
"""Quantize a model into a packed checkpoint: rotate, plan, round layer by layer, write atomically."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ext import __version__
from vllm_ext.compress.balance import make_balanced_windows
from vllm_ext.compress.cache import StageCache, hash_array
from vllm_ext.compress.calibration import NUM_WINDOWS, CalibrationError, load_tokenizer, make_windows
from vllm_ext.compress.held_out import count_windows, split_held_out
from vllm_ext.compress.linear_error import has_experts
from vllm_ext.compress.measuring import describe_shortage
from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.compress.plan_report import PlanReport, pair_blocks
from vllm_ext.compress.planning import make_plan
from vllm_ext.compress.progress import track
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rotation import rotate_source
from vllm_ext.compress.rounders import ROUNDERS, make_rounder
from vllm_ext.compress.rounding import QuantizedWeight, round_to_nearest
from vllm_ext.compress.router_repair import RouterRepair, list_repair_constants, repair_routers
from vllm_ext.compress.sequential import make_cache, read_layer, round_layers
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.quantization.checkpoint import (
    SHARD_BYTES,
    check_output,
    list_tensors,
    make_producer,
    pack_weight,
    write_checkpoint,
)
from vllm_ext.quantization.plan import ExpertSchemes, Plan
from vllm_ext.quantization.safetensors_io import TensorInfo
from vllm_ext.quantization.scheme import Scheme

#: How codes are chosen.
ROUNDINGS = tuple(ROUNDERS)


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. total_bytes: of all tensors, quantized or not. seconds: of the whole run.

    repair: of the routers, None where it was not asked for.
    """

    output: Path
    planned: PlanReport
    total_bytes: int
    seconds: float
    repair: RouterRepair | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `vllm-ext quantize --json` prints."""
        return {
            "output": str(self.output),
            "bits_per_weight": self.planned.bits_per_weight,
            "quantized_bytes": self.planned.quantized_bytes,
            "total_bytes": self.total_bytes,
            "plan_sha256": self.planned.plan.sha256,
            "seconds": self.seconds,
            **({} if self.repair is None else {"router_repair": self.repair.to_json()}),
        }


def quantize_model(
    model: str | Path,
    output: str | Path,
    *,
    bits: float | None = None,
    schemes: Sequence[Scheme] = (),
    uniform: bool = False,
    rounding: str = "rtn",
    calibration: Sequence[str | Path] = (),
    seed: int = 0,
    num_windows: int = NUM_WINDOWS,
    plan: Plan | None = None,
    rotate: bool = False,
    balanced: bool = False,
    sweeps: int = SWEEPS,
    repair_router: bool = False,
    work: Path | None = None,
    options: PlanOptions | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> QuantizeReport:
    """Quantize the model directory `model` into the new directory `output`.

    bits, schemes, uniform, calibration, seed, num_windows, plan and options as `planning.make_plan`; modules that the
    plan does not name are copied. rounding: one of ROUNDINGS; gptq and gptaq need calibration and run the model one
    layer at a time, rtn reads, rounds and writes one weight at a time. rotate: see `rotation.rotate_source`, with the
    seed.
    balanced: choose windows as `balance.make_balanced_windows` does. sweeps: see `refine.refine_codes`, for gptq and
    gptaq. repair_router: fit the routers to the quantized model, see `router_repair`; needs calibration, of which a
    third more than num_windows is drawn (where there is as much) and a quarter held out from rounding, so that what
    judges the routers is text that no code was chosen with.
    work: where measurements of the plan, each layer that gptq and gptaq finished, and the routers are kept, so that a
    run that was killed goes on there; None: a hidden folder beside `output`, removed at the end. The same inputs and
    seed give the same files, byte for byte.
    Raises ValueError (its subclasses name the cause) for anything that cannot be used; `output` then does not exist.
    """
    started = time.monotonic()
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDINGS)}")
    if rounding != "rtn" and not calibration:
        raise CalibrationError(f"--rounding {rounding} needs calibration text: give --calibration FILE, or use rtn")
    if repair_router and not calibration:
        raise CalibrationError("--repair-router needs calibration text: give --calibration FILE")
    if balanced and rounding == "rtn" and not repair_router:
        raise ValueError(
            "--balanced chooses calibration text for gptq and gptaq, or --repair-router; --rounding rtn uses none"
        )
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps}")
    check_output(Path(output))
    source = open_source(model)
    for wanted, option in ((balanced, "--balanced"), (repair_router, "--repair-router")):
        if wanted and not has_experts(source):
            raise ValueError(f"{option} is about routed experts, of which {source.directory} has none: leave it out")
    windows = None
    drawn = count_windows(num_windows) if repair_router else num_windows
    if rounding != "rtn" or repair_router:
        tokenizer = load_tokenizer(source.directory)
        if balanced:
            windows = make_balanced_windows(
                source, calibration, tokenizer, seed=seed, num_windows=drawn, progress=progress
            )
        else:
            known = source.config.get("vocab_size")
            windows = make_windows(calibration, tokenizer, seed=seed, num_windows=drawn, vocab_size=known)
    if rotate:
        source = rotate_source(source, seed)
    folder, cache = work or Path(output).with_name(f".{Path(output).name}.work"), None
    planned = make_plan(
        source,
        bits=bits,
        schemes=schemes,
        uniform=uniform,
        calibration=calibration,
        seed=seed,
        num_windows=num_windows,
        fixed=plan,
        rounding=rounding,
        sweeps=sweeps,
        options=replace(options or PlanOptions(), work=folder),
        progress=progress,
    )
    targets = _list_targets(source, planned.plan)
    ignore = tuple(path for path in source.modules if path not in planned.plan.modules)
    details: dict[str, Any] = {} if bits is None else {"bits": bits}
    chosen = (("rotated", rotate), ("balanced", balanced), ("router_repair", repair_router))
    details |= {name: True for name, on in chosen if on}
    producer = make_producer(rounding=rounding, seed=seed, uniform=uniform, **details)
    infos = _list_infos(source, targets)
    repair = None
    if bits is None and windows is not None:
        planned = replace(planned, notes=(*planned.notes, *describe_shortage(windows, drawn)))
    if windows is None:
        tensors = track(_round_tensors(source, targets), "quantize", len(infos), progress)
    else:
        key = {"rounding": rounding, "sweeps": sweeps, "rotate": seed if rotate else None, "plan": planned.plan.sha256}
        held = windows[:0]
        if repair_router:
            windows, held = split_held_out(windows)
            key |= {"held_out": hash_array(held), "router_repair": list_repair_constants()}
        cache = make_cache(folder, source, windows, key)
        layers: Iterator[tuple[int, Mapping[str, QuantizedWeight]]] = round_layers(
            source, planned.plan, make_rounder(rounding, sweeps), windows, cache=cache, progress=progress
        )
        if repair_router:
            # All layers first: whether the new gates are better is known at the end alone.
            for _ in layers:
                pass
            repair = _repair_routers(source, planned.plan, windows, held, cache, progress)
            layers = _read_layers(source, planned.plan, cache)
        tensors = _pack_layers(source, targets, layers, {} if repair is None else repair.gates)
    total = write_checkpoint(
        Path(output),
        plan=Plan(planned.plan.modules, ignore, producer),
        config=source.config,
        infos=infos,
        tensors=tensors,
        model_card=make_model_card(source, planned, rounding, rotate, repair),
        companions=source.directory,
        shard_bytes=shard_bytes,
    )
    if cache is not None:
        cache.remove()
    if work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return QuantizeReport(Path(output), planned, total, time.monotonic() - started, repair)


def make_model_card(
    source: SourceModel, planned: PlanReport, rounding: str, rotate: bool = False, repair: RouterRepair | None = None
) -> str:
    """README.md of the checkpoint: what it is, how many bits, how to serve it."""
    name = source.directory.resolve().name
    rows = ["| scheme | gate_up blocks | down blocks | other linears |", "|---|---|---|---|"]
    counts: dict[str, Counter[str]] = {}
    for schemes in planned.plan.modules.values():
        parts = schemes._asdict() if isinstance(schemes, ExpertSchemes) else {"other": schemes}
        for block, scheme in parts.items():
            counts.setdefault(str(scheme), Counter())[block] += 1
    for scheme in sorted(counts):
        rows.append("| " + " | ".join([scheme, *(str(counts[scheme][b]) for b in ("gate_up", "down", "other"))]) + " |")
    table = "\n".join(rows)
    others = "all other tensors are those of the original"
    if rotate:
        others += (
            ", with the residual stream rotated by a randomized Hadamard matrix, which leaves its function as it is"
        )
    if repair is not None and repair.kept:
        others += "; the routers are fitted anew to the quantized model"
    return f"""---
base_model: {name}
library_name: vllm
tags: [vllm-ext, mxmoe, quantized]
---

# {name}{"" if planned.bits_per_weight is None else f", {planned.bits_per_weight:.3f} bits per weight"}

Mixed-precision weights of {name}, made by vllm-ext {__version__} (`vllm-ext quantize --method mxmoe`, rounding
{rounding}): {planned.describe_size()}, scales and zero points included; {others}.
The licence of the original model applies.

    pip install vllm-ext
    vllm serve DIRECTORY

{table}

The scheme of every module is in `config.json` under `quantization_config`.
"""


def _list_targets(source: SourceModel, plan: Plan) -> dict[str, Scheme]:
    """{name of a checkpoint tensor that is replaced: scheme}."""
    targets: dict[str, Scheme] = {}
    for path, schemes in plan.modules.items():
        for block, scheme in pair_blocks(source.modules[path], schemes):
            if scheme.is_quantized:
                targets.update({f"{linear}.weight": scheme for linear in block.paths})
    return targets


def _list_infos(source: SourceModel, targets: dict[str, Scheme]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for name, info in source.reader.infos.items():
        if name in targets:
            N, K = info.shape
            infos.update(list_tensors(name.removesuffix(".weight"), targets[name], N, K, info.dtype))
        else:
            infos[name] = info
    return infos


def _round_tensors(source: SourceModel, targets: dict[str, Scheme]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result, rounded to nearest, in the order of the source's files."""
    for name in source.reader.infos:
        tensor = source.reader.read(name)
        scheme = targets.get(name)
        if scheme is None:
            yield name, tensor
            continue
        path = name.removesuffix(".weight")
        for suffix, packed in pack_weight(*round_to_nearest(tensor, scheme, path), scheme).items():
            yield f"{path}.{suffix}", packed


def _pack_layers(
    source: SourceModel,
    targets: dict[str, Scheme],
    layers: Iterable[tuple[int, Mapping[str, QuantizedWeight]]],
    gates: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result: the quantized ones as their layers are done, then the rest, gates replaced."""
    for _, layer in layers:
        for path, codes in layer.items():
            for suffix, packed in pack_weight(*codes, targets[f"{path}.weight"]).items():
                yield f"{path}.{suffix}", packed.cpu()
    for name in source.reader.infos:
        if name not in targets:
            yield name, gates[name].cpu() if name in gates else source.reader.read(name)


def _read_layers(
    source: SourceModel, plan: Plan, cache: StageCache
) -> Iterator[tuple[int, Mapping[str, QuantizedWeight]]]:
    """What `round_layers` has finished."""
    for layer in sorted({module.layer for module in source.modules.values() if module.layer is not None}):
        yield layer, read_layer(source, plan, layer, cache)


def _repair_routers(
    source: SourceModel, plan: Plan, windows: np.ndarray, held: np.ndarray, cache: StageCache, progress: bool
) -> RouterRepair:
    return repair_routers(
        source,
        plan,
        lambda layer: read_layer(source, plan, layer.index, cache),
        windows,
        held,
        cache=cache,
        progress=progress,
    )
