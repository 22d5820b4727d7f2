# SPDX-License-Identifier: Apache-2.0
"""A decoder layer that computes with quantized weights, and with 8-bit activations where its schemes say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from vllm_ext.compress.families import Kind, Module
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.rounding import QuantizedWeight, dequantize
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import StreamedLayer
from vllm_ext.kernels.act_quant.reference import round_activations
from vllm_ext.quantization.scheme import Scheme

#: {(expert, block name): scheme} of a layer's routed experts.
BlockSchemes = Mapping[tuple[int, str], Scheme]

#: {checkpoint path of another linear of the layer: scheme}.
LinearSchemes = Mapping[str, Scheme]


class RoundedExperts(torch.nn.Module):
    """The routed experts of a layer from codes, dequantized one at a time as tokens ask for them.

    float_experts: where blocks without codes take their weights. family: the adapter that reads them.
    """

    def __init__(self, float_experts: torch.nn.Module, layer: StreamedLayer) -> None:
        super().__init__()
        # In a list, so that it is no part of this module and its parameters are not counted twice.
        self._float = [float_experts]
        self._family = layer.stream.family
        self._blocks: dict[tuple[int, str], tuple[Scheme, QuantizedWeight]] = {}

    def set_block(self, expert: int, block: str, scheme: Scheme, quantized: QuantizedWeight) -> None:
        """Use these codes, gate stacked over up for "gate_up"."""
        self._blocks[expert, block] = scheme, quantized

    def weight(self, expert: int, block: str) -> torch.Tensor:
        """The weight [N, K] that a block multiplies by."""
        found = self._blocks.get((expert, block))
        if found is None:
            return self._family.expert_weight(self._float[0], expert, block)
        return dequantize(found[1], found[0])

    def apply_block(self, expert: int, block: str, inputs: torch.Tensor) -> torch.Tensor:
        """Output [tokens, N] for inputs [tokens, K]."""
        found = self._blocks.get((expert, block))
        rounded = inputs if found is None else round_inputs(inputs, found[0])
        return functional.linear(rounded, self.weight(expert, block).to(inputs.dtype))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the experts' outputs, [tokens, hidden]."""
        total = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            inner = apply_gate(self.apply_block(expert, "gate_up", hidden[rows]))
            output = self.apply_block(expert, "down", inner) * weights[rows, slots, None]
            total.index_add_(0, rows, output.to(total.dtype))
        return total


def round_inputs(inputs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What a linear of this scheme sees of its inputs [tokens, K]: int8 values for a8, else the inputs."""
    if scheme.act_bits == 16:
        return inputs
    return round_activations(inputs.float(), scheme.group_size).to(inputs.dtype)


def copy_layer(layer: StreamedLayer) -> torch.nn.Module:
    """A module of the layer that shares its tensors, whose parts may be replaced."""
    return layer.stream.fill_layer(layer.index, layer.module.state_dict())


def build_rounded_layer(
    layer: StreamedLayer, schemes: BlockSchemes, linears: LinearSchemes, rounded: Mapping[str, QuantizedWeight]
) -> torch.nn.Module:
    """The layer with the quantized weights {path: codes} of `round_layer` in place; the rest is shared with it."""
    module = copy_layer(layer)
    for path, scheme in linears.items():
        if scheme.is_quantized:
            set_linear(module, layer, path, scheme, rounded[path])
    float_experts = layer.stream.family.find_experts(module)
    if float_experts is not None and schemes:
        experts = RoundedExperts(float_experts, layer)
        modules = list_experts(layer.stream.source, layer.index)
        for (expert, block), scheme in schemes.items():
            if scheme.is_quantized:
                experts.set_block(expert, block, scheme, join_block(modules[expert], block, rounded))
        layer.stream.family.replace_experts(module, experts)
    return module


def set_linear(
    module: torch.nn.Module, layer: StreamedLayer, path: str, scheme: Scheme, quantized: QuantizedWeight
) -> None:
    """Put a quantized linear of the layer in its place."""
    linear = find_linear(module, layer, path)
    weight = dequantize(quantized, scheme).to(layer.stream.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if scheme.act_bits != 16:

        def round_arguments(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = arguments[0]
            return (round_inputs(inputs.flatten(0, -2), scheme).view_as(inputs), *arguments[1:])

        linear.register_forward_pre_hook(round_arguments)


def find_linear(module: torch.nn.Module, layer: StreamedLayer, path: str) -> torch.nn.Module:
    """A linear of the layer by its checkpoint path."""
    return layer.stream.family.find_linear(module, layer.index, path)


def list_experts(source: SourceModel, layer: int) -> dict[int, Module]:
    """{number: module} of the routed experts of a layer."""
    return {
        module.expert: module
        for module in source.modules.values()
        if module.kind is Kind.EXPERT and module.layer == layer and module.expert is not None
    }


def find_paths(module: Module, block: str) -> tuple[str, ...]:
    """Checkpoint paths of the linears of a block, in the order in which they are stacked."""
    return next(found.paths for found in module.blocks if found.name == block)


def list_path_schemes(
    source: SourceModel, layer: int, schemes: BlockSchemes, linears: LinearSchemes
) -> dict[str, Scheme]:
    """{checkpoint path of a linear: scheme} of everything in a layer that is quantized."""
    modules = list_experts(source, layer)
    found = dict(linears)
    for (expert, block), scheme in schemes.items():
        found.update(dict.fromkeys(find_paths(modules[expert], block), scheme))
    return {path: scheme for path, scheme in found.items() if scheme.is_quantized}


def split_block(module: Module, block: str, quantized: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """{checkpoint path: codes} of a block that was rounded as one stack."""
    paths = find_paths(module, block)
    parts = [part if part is None else part.chunk(len(paths)) for part in quantized]
    return {
        path: QuantizedWeight(*(None if part is None else part[place].contiguous() for part in parts))
        for place, path in enumerate(paths)
    }


def join_block(module: Module, block: str, rounded: Mapping[str, QuantizedWeight]) -> QuantizedWeight:
    """The inverse of `split_block`."""
    parts = [rounded[path] for path in find_paths(module, block)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )
