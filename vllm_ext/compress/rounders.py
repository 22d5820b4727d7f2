# SPDX-License-Identifier: Apache-2.0
"""How the codes of a layer are chosen: one object per run, given the layers in forward order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_ext.compress.families import RoutedTokens
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.gptq import DAMPING, round_with_hessian
from vllm_ext.compress.hessian import (
    MIN_TOKENS_PER_INPUT,
    Moments,
    measure_moments,
    minimum_tokens,
    spread_rows,
    weigh_tokens,
)
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rounded_layer import (
    BlockSchemes,
    LinearSchemes,
    RoundedExperts,
    build_rounded_layer,
    copy_layer,
    find_linear,
    list_experts,
    list_path_schemes,
    round_inputs,
    set_linear,
    split_block,
)
from vllm_ext.compress.rounding import QuantizedWeight, round_to_nearest
from vllm_ext.compress.streaming import StreamedLayer
from vllm_ext.quantization.scheme import Scheme


class Rounder(Protocol):
    """Chooses codes, layer by layer from the first to the last."""

    def round_layer(
        self, layer: StreamedLayer, schemes: BlockSchemes, linears: LinearSchemes | None = None
    ) -> dict[str, QuantizedWeight]:
        """{checkpoint path of a linear: codes} of every quantized block of the layer.

        schemes: of the routed experts, by (expert, block name). linears: of attention and dense layers, by path.
        """

    def replay_layer(
        self,
        layer: StreamedLayer,
        schemes: BlockSchemes,
        linears: LinearSchemes | None,
        rounded: Mapping[str, QuantizedWeight],
    ) -> None:
        """Go on as if `round_layer` had returned `rounded`, which an earlier run did."""


class NearestRounder:
    """Round to nearest: no calibration, no state."""

    def round_layer(
        self, layer: StreamedLayer, schemes: BlockSchemes, linears: LinearSchemes | None = None
    ) -> dict[str, QuantizedWeight]:
        """As `Rounder.round_layer`."""
        source = layer.stream.source
        wanted = list_path_schemes(source, layer.index, schemes, linears or {})
        return {
            path: round_to_nearest(source.reader.read(f"{path}.weight"), scheme, path)
            for path, scheme in wanted.items()
        }

    def replay_layer(
        self,
        layer: StreamedLayer,
        schemes: BlockSchemes,
        linears: LinearSchemes | None,
        rounded: Mapping[str, QuantizedWeight],
    ) -> None:
        """Nothing depends on the layers before."""


@dataclass(frozen=True)
class HessianOptions:
    """How GPTQ is run.

    asymmetric: keep outputs close to those of the unquantized path (GPTAQ), not to those of the unquantized layer on
    the quantized path. act_order, clip, damping, sweeps: see `gptq.round_with_hessian`. routing_power: see
    `hessian.weigh_tokens`. dtype: of Hessians. chunk_bytes: Hessians and weights of experts that are worked on at a
    time.
    """

    asymmetric: bool = False
    act_order: bool = True
    clip: bool = True
    damping: float = DAMPING
    sweeps: int = SWEEPS
    routing_power: float = 2.0
    dtype: torch.dtype = torch.float32
    chunk_bytes: int = 256 * 2**20


class HessianRounder:
    """GPTQ or GPTAQ, with every layer's inputs coming from the quantized layers before it.

    Within a layer too, later linears see what the quantized earlier ones put out: q/k/v, then o, then gate and up of
    the experts, then down. An expert's Hessian is the mean over the tokens routed to it on the quantized path, by
    routing weight; below `hessian.minimum_tokens` tokens it is mixed with that of other tokens of the layer, in the
    share that is missing, and an expert that no token reaches uses those alone.
    `outputs` are the outputs of the last layer that was given, on the quantized path.
    """

    def __init__(self, options: HessianOptions | None = None) -> None:
        self.options = options or HessianOptions()
        self.outputs: list[torch.Tensor] | None = None
        self._next = 0

    def round_layer(
        self, layer: StreamedLayer, schemes: BlockSchemes, linears: LinearSchemes | None = None
    ) -> dict[str, QuantizedWeight]:
        """As `Rounder.round_layer`. Raises ValueError for a layer out of order."""
        inputs = self._begin(layer)
        module = copy_layer(layer)
        rounded: dict[str, QuantizedWeight] = {}
        with torch.no_grad():
            for stage in _list_stages(layer, linears or {}):
                rounded.update(self._round_stage(layer, module, stage, inputs))
            if any(scheme.is_quantized for scheme in schemes.values()):
                rounded.update(self._round_experts(layer, module, schemes, inputs))
            self.outputs = layer.run(module, inputs)
        return rounded

    def replay_layer(
        self,
        layer: StreamedLayer,
        schemes: BlockSchemes,
        linears: LinearSchemes | None,
        rounded: Mapping[str, QuantizedWeight],
    ) -> None:
        """As `Rounder.replay_layer`."""
        inputs = self._begin(layer)
        self.outputs = layer.run(build_rounded_layer(layer, schemes, linears or {}, rounded), inputs)

    def _begin(self, layer: StreamedLayer) -> list[torch.Tensor]:
        if layer.index != self._next:
            raise ValueError(f"layers come in order: expected layer {self._next}, got layer {layer.index}")
        self._next += 1
        return layer.inputs if self.outputs is None else self.outputs

    def _round_stage(
        self, layer: StreamedLayer, module: torch.nn.Module, stage: LinearSchemes, inputs: list[torch.Tensor]
    ) -> dict[str, QuantizedWeight]:
        """Linears that share their input, outside of the experts."""
        first = next(iter(stage))
        scheme = stage[first]
        parts: list[torch.Tensor] = []
        references: list[torch.Tensor] = []
        with _record_inputs(find_linear(module, layer, first), parts):
            layer.run(module, inputs)
        if self.options.asymmetric:
            with _record_inputs(find_linear(layer.module, layer, first), references):
                layer.run(layer.module, layer.inputs)
        rows = round_inputs(torch.cat(parts), scheme)
        moments = measure_moments(
            rows, reference=torch.cat(references) if references else None, dtype=self.options.dtype, name=first
        )
        rounded = {}
        for path, scheme in stage.items():
            weight = find_linear(layer.module, layer, path).weight
            rounded[path] = self._choose_codes([weight], [moments], scheme, path)[0]
        for path, scheme in stage.items():
            set_linear(module, layer, path, scheme, rounded[path])
        return rounded

    def _round_experts(
        self, layer: StreamedLayer, module: torch.nn.Module, schemes: BlockSchemes, inputs: list[torch.Tensor]
    ) -> dict[str, QuantizedWeight]:
        family = layer.stream.family
        float_experts = family.find_experts(module)
        if float_experts is None:
            raise ValueError(f"layer {layer.index} has no routed experts, but schemes for {next(iter(schemes))}")
        seen: list[RoutedTokens] = []
        family.replace_experts(module, _Recorder(seen))
        layer.run(module, inputs)
        routed = RoutedTokens.join(seen)
        experts = RoundedExperts(float_experts, layer)
        family.replace_experts(module, experts)
        modules = list_experts(layer.stream.source, layer.index)
        rounded: dict[str, QuantizedWeight] = {}
        # Of tokens of the layer: the same for every expert's gate_up.
        shared: dict[Scheme, Moments] = {}
        for block in ("gate_up", "down"):
            for scheme, numbers in self._chunk_experts(schemes, block, experts):
                weights = [family.expert_weight(float_experts, number, block) for number in numbers]
                moments = [
                    self._measure_expert(layer, experts, routed, number, block, scheme, shared) for number in numbers
                ]
                name = f"{family.layer_prefix(layer.index)}experts {numbers}, {block}"
                for number, codes in zip(numbers, self._choose_codes(weights, moments, scheme, name), strict=True):
                    experts.set_block(number, block, scheme, codes)
                    rounded.update(split_block(modules[number], block, codes))
        return rounded

    def _measure_expert(
        self,
        layer: StreamedLayer,
        experts: RoundedExperts,
        routed: RoutedTokens,
        number: int,
        block: str,
        scheme: Scheme,
        shared: dict[Scheme, Moments],
    ) -> Moments:
        """Moments of one block's inputs, completed with other tokens of the layer where it has too few.

        shared: moments of such tokens for gate_up, by scheme; filled when they are first needed.
        """
        rows, routing = routed.find_tokens(number)
        K = experts.weight(number, block).shape[1]
        least = minimum_tokens(K)
        weights = weigh_tokens(routing, self.options.routing_power)
        own = self._measure_rows(layer, experts, routed, number, block, scheme, rows, weights)
        if len(rows) >= least:
            return own
        every = shared.get(scheme) if block == "gate_up" else None
        if every is None:
            others = spread_rows(len(routed.hidden), least, rows.device)
            every = self._measure_rows(layer, experts, routed, number, block, scheme, others, None)
            if block == "gate_up":
                shared[scheme] = every
        return own.mix(every, len(rows) / least)

    def _measure_rows(
        self,
        layer: StreamedLayer,
        experts: RoundedExperts,
        routed: RoutedTokens,
        number: int,
        block: str,
        scheme: Scheme,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> Moments:
        inputs = routed.hidden[rows]
        reference = None
        if self.options.asymmetric:
            assert layer.routed is not None
            reference = layer.routed.hidden[rows]
        if block == "down":
            inputs = apply_gate(experts.apply_block(number, "gate_up", inputs))
            if reference is not None:
                gate_up = layer.stream.family.expert_weight(_float_experts(layer), number, "gate_up")
                reference = apply_gate(torch.nn.functional.linear(reference, gate_up))
        name = f"{layer.stream.family.layer_prefix(layer.index)}expert {number}, {block},"
        return measure_moments(round_inputs(inputs, scheme), weights, reference, self.options.dtype, name)

    def _choose_codes(
        self, weights: list[torch.Tensor], moments: list[Moments], scheme: Scheme, name: str
    ) -> list[QuantizedWeight]:
        drifts = [moment.drift for moment in moments if moment.drift is not None]
        return round_with_hessian(
            torch.stack(weights),
            torch.stack([moment.hessian for moment in moments]),
            scheme,
            drifts=torch.stack(drifts) if drifts else None,
            act_order=self.options.act_order,
            clip=self.options.clip,
            damping=self.options.damping,
            sweeps=self.options.sweeps,
            name=name,
        )

    def _chunk_experts(
        self, schemes: BlockSchemes, block: str, experts: RoundedExperts
    ) -> Iterator[tuple[Scheme, list[int]]]:
        """(scheme, experts) that are rounded together: equal schemes, within `chunk_bytes`."""
        groups: dict[Scheme, list[int]] = {}
        for (number, name), scheme in schemes.items():
            if name == block and scheme.is_quantized:
                groups.setdefault(scheme, []).append(number)
        for scheme, numbers in groups.items():
            N, K = experts.weight(numbers[0], block).shape
            # Hessian, its factors and the drift; weights, their target, codes, scales and working copies.
            size = 6 * K * K * self.options.dtype.itemsize + 10 * N * K * 4
            count = max(1, self.options.chunk_bytes // size)
            for start in range(0, len(numbers), count):
                yield scheme, numbers[start : start + count]


#: {name: makes a rounder for one run}.
ROUNDERS: dict[str, Callable[[], Rounder]] = {
    "rtn": NearestRounder,
    "gptq": lambda: HessianRounder(HessianOptions(asymmetric=False)),
    "gptaq": lambda: HessianRounder(HessianOptions(asymmetric=True)),
}


def make_rounder(name: str, sweeps: int = SWEEPS) -> Rounder:
    """A rounder of ROUNDERS for one run, with another number of passes over finished codes; rtn has none."""
    rounder = ROUNDERS[name]()
    if isinstance(rounder, HessianRounder):
        rounder.options = dataclasses.replace(rounder.options, sweeps=sweeps)
    return rounder


def list_constants() -> dict[str, float]:
    """Numbers of this package that decide codes beside a rounder's arguments: part of what stored codes depend on."""
    return {"damping": DAMPING, "min_tokens_per_input": MIN_TOKENS_PER_INPUT}


class _Recorder(torch.nn.Module):
    """Stands in for experts: keeps what they are given and adds nothing to the layer's output."""

    def __init__(self, seen: list[RoutedTokens]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._seen.append(RoutedTokens(hidden, ids, weights))
        return torch.zeros_like(hidden)


class _record_inputs:  # noqa: N801 - used as a function, in a with statement
    """Keeps the inputs [tokens, K] of a linear while the context lasts."""

    def __init__(self, linear: torch.nn.Module, kept: list[torch.Tensor]) -> None:
        self._linear, self._kept = linear, kept

    def __enter__(self) -> None:
        def record(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            self._kept.append(arguments[0].flatten(0, -2))

        self._handle = self._linear.register_forward_pre_hook(record)

    def __exit__(self, *_error: object) -> None:
        self._handle.remove()


def _float_experts(layer: StreamedLayer) -> torch.nn.Module:
    experts = layer.stream.family.find_experts(layer.module)
    assert experts is not None
    return experts


def _list_stages(layer: StreamedLayer, linears: LinearSchemes) -> Iterator[dict[str, Scheme]]:
    """Quantized linears outside of the experts, in the order in which data passes them, siblings together."""
    for names in layer.stream.family.linear_order:
        stage = {path: s for path, s in linears.items() if path.rpartition(".")[2] in names and s.is_quantized}
        if stage:
            yield stage
