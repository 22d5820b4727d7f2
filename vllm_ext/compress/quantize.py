# SPDX-License-Identifier: Apache-2.0
"""Quantize a model into a packed checkpoint: plan, round layer by layer, write atomically."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ext import __version__
from vllm_ext.compress.planning import PlanReport, make_plan, pair_blocks
from vllm_ext.compress.progress import track
from vllm_ext.compress.rounding import QuantizedWeight, round_to_nearest
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

#: How codes are chosen: name -> function (weight [N, K], scheme, name for errors) -> codes, scales, zeros.
ROUNDINGS: dict[str, Callable[[torch.Tensor, Scheme, str], QuantizedWeight]] = {"rtn": round_to_nearest}


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. total_bytes: of all tensors, quantized or not. seconds: of the whole run."""

    output: Path
    planned: PlanReport
    total_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `vllm-ext quantize --json` prints."""
        return {
            "output": str(self.output),
            "bits_per_weight": self.planned.bits_per_weight,
            "quantized_bytes": self.planned.quantized_bytes,
            "total_bytes": self.total_bytes,
            "plan_sha256": self.planned.plan.sha256,
            "seconds": self.seconds,
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
    plan: Plan | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> QuantizeReport:
    """Quantize the model directory `model` into the new directory `output`.

    bits, schemes, uniform, calibration, seed and plan as `planning.make_plan`; modules the plan does not name are
    copied. rounding: a key of ROUNDINGS. Weights are read, rounded and written one at a time; calibration alone loads
    the whole model. The same inputs and seed give the same files, byte for byte.
    Raises ValueError (its subclasses name the cause) for anything that cannot be used; `output` then does not exist.
    """
    started = time.monotonic()
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDINGS)}")
    check_output(Path(output))
    source = open_source(model)
    planned = make_plan(
        source,
        bits=bits,
        schemes=schemes,
        uniform=uniform,
        calibration=calibration,
        seed=seed,
        fixed=plan,
        progress=progress,
    )
    targets = _list_targets(source, planned.plan)
    ignore = tuple(path for path in source.modules if path not in planned.plan.modules)
    producer = make_producer(rounding=rounding, seed=seed, uniform=uniform, **({} if bits is None else {"bits": bits}))
    infos = _list_infos(source, targets)
    rounded = _round_tensors(source, targets, ROUNDINGS[rounding])
    total = write_checkpoint(
        Path(output),
        plan=Plan(planned.plan.modules, ignore, producer),
        config=source.config,
        infos=infos,
        tensors=track(rounded, "quantize", len(infos), progress),
        model_card=make_model_card(source, planned, rounding),
        companions=source.directory,
        shard_bytes=shard_bytes,
    )
    return QuantizeReport(Path(output), planned, total, time.monotonic() - started)


def make_model_card(source: SourceModel, planned: PlanReport, rounding: str) -> str:
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
    return f"""---
base_model: {name}
library_name: vllm
tags: [vllm-ext, mxmoe, quantized]
---

# {name}, {planned.bits_per_weight:.3f} bits per weight

Mixed-precision weights of {name}, made by vllm-ext {__version__} (`vllm-ext quantize --method mxmoe`, rounding
{rounding}). {planned.quantized_weights} weights take {planned.quantized_bytes} bytes, scales and zero points included;
all other tensors are those of the original. The licence of the original model applies.

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


def _round_tensors(
    source: SourceModel, targets: dict[str, Scheme], rounding: Callable[[torch.Tensor, Scheme, str], QuantizedWeight]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result, in the order of the source's files."""
    for name in source.reader.infos:
        tensor = source.reader.read(name)
        scheme = targets.get(name)
        if scheme is None:
            yield name, tensor
            continue
        path = name.removesuffix(".weight")
        for suffix, packed in pack_weight(*rounding(tensor, scheme, path), scheme).items():
            yield f"{path}.{suffix}", packed
