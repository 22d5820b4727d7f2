# SPDX-License-Identifier: Apache-2.0
"""Linears of a dense model as blocks whose schemes are chosen, and what each scheme does to its layer's output.

The counterpart of `layer_error`, which measures the blocks of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.families import QUANTIZABLE, Block, Kind, Module
from vllm_ext.compress.gptq import round_with_hessian
from vllm_ext.compress.hessian import measure_moments
from vllm_ext.compress.rounded_layer import copy_layer, find_linear, round_inputs, set_linear
from vllm_ext.compress.rounding import QuantizedWeight, round_to_nearest
from vllm_ext.compress.sensitivity import Unit
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import StreamedLayer
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme


def has_experts(source: SourceModel) -> bool:
    """Whether a model has routed experts; one that has none is dense."""
    return any(module.kind is Kind.EXPERT for module in source.modules.values())


def list_linear_groups(source: SourceModel, fixed: Plan) -> list[Module]:
    """The quantizable linears of the decoder layers that a plan says nothing about, siblings that vLLM fuses as one.

    A group has the path of its first linear, and one block with the paths of all.
    Siblings of which the plan names some are left to `SourceModel.check_plan`, which refuses that.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Module]] = {}
    for path, module in source.modules.items():
        if module.kind not in QUANTIZABLE or module.layer is None or fixed.names(path):
            continue
        parent, _, name = path.rpartition(".")
        siblings = next((group for group in source.family.fused if name in group), (name,))
        groups.setdefault((parent, siblings), []).append(module)
    found = []
    for (_, siblings), members in groups.items():
        ordered = sorted(members, key=lambda member: siblings.index(member.path.rpartition(".")[2]))
        blocks = [block for member in ordered for block in member.blocks]
        joined = Block(
            "weight",
            tuple(path for block in blocks for path in block.paths),
            tuple(shape for block in blocks for shape in block.shapes),
            blocks[0].itemsize,
        )
        found.append(Module(ordered[0].path, ordered[0].kind, ordered[0].layer, (joined,)))
    return found


def measure_linears(
    layer: StreamedLayer,
    units: Sequence[Unit],
    places: Sequence[int],
    columns: int,
    gradient: torch.Tensor | None,
    scored: int,
    sweeps: int | None,
) -> np.ndarray:
    """Costs as `layer_error.Sensitivities` has them, float64 [2 (layer, loss), places, columns].

    places: rows of `units` that are groups of linears of this layer. gradient: of the summed loss at the layer's
    output, [tokens, hidden]. scored: tokens that the loss is the mean of. sweeps: of GPTQ; None rounds to nearest.
    The layer runs once for each different scheme of each group.
    """
    found = np.full((2, len(places), columns), np.inf)
    expected = [output.float() for output in layer.outputs]
    with torch.no_grad():
        for row, place in enumerate(places):
            unit = units[place]
            rows = _find_inputs(layer, unit.block.paths[0]) if sweeps is not None else None
            hessians: dict[tuple[int, int], torch.Tensor] = {}
            columns_of: dict[Scheme, list[int]] = {}
            for column, scheme in enumerate(unit.options):
                if scheme is not None:
                    columns_of.setdefault(scheme, []).append(column)
            for scheme, same in columns_of.items():
                if not scheme.is_quantized:
                    found[:, row, same] = 0.0
                    continue
                hessian = None if rows is None else _measure_hessian(rows, scheme, hessians, unit.module.path)
                module = copy_layer(layer)
                for path in unit.block.paths:
                    weight = find_linear(layer.module, layer, path).weight
                    assert isinstance(weight, torch.Tensor)
                    codes = _choose_codes(weight, hessian, scheme, sweeps, path)
                    set_linear(module, layer, path, scheme, codes)
                squares = losses = 0.0
                start = 0
                for output, wanted in zip(layer.run(module, layer.inputs), expected, strict=True):
                    change = (output.float() - wanted).flatten(0, -2)
                    squares += float(change.square().sum(dtype=torch.float64))
                    if gradient is not None:
                        part = gradient[start : start + len(change)].to(change.device)
                        losses += float((change * part).square().sum(dtype=torch.float64))
                    start += len(change)
                for column in same:
                    found[:, row, column] = squares, losses / (2 * scored) if gradient is not None else np.inf
    return found


def _choose_codes(
    weight: torch.Tensor, hessian: torch.Tensor | None, scheme: Scheme, sweeps: int | None, name: str
) -> QuantizedWeight:
    if hessian is None or sweeps is None:
        return round_to_nearest(weight, scheme, name)
    return round_with_hessian(weight[None], hessian[None], scheme, sweeps=sweeps, name=name)[0]


def _measure_hessian(
    rows: torch.Tensor, scheme: Scheme, known: dict[tuple[int, int], torch.Tensor], name: str
) -> torch.Tensor:
    """Second moments of inputs [tokens, K] as a scheme rounds them. known: those measured, by what the rounding is."""
    key = (16, 0) if scheme.act_bits == 16 else (scheme.act_bits, scheme.group_size)
    if key not in known:
        known[key] = measure_moments(round_inputs(rows, scheme), name=name).hessian
    return known[key]


def _find_inputs(layer: StreamedLayer, path: str) -> torch.Tensor:
    """Inputs [tokens, K] of a linear on the unquantized path."""
    parts: list[torch.Tensor] = []

    def record(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        parts.append(arguments[0].flatten(0, -2))

    handle = find_linear(layer.module, layer, path).register_forward_pre_hook(record)
    try:
        layer.run(layer.module, layer.inputs)
    finally:
        handle.remove()
    return torch.cat(parts)
