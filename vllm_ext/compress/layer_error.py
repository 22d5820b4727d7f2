# SPDX-License-Identifier: Apache-2.0
"""What quantizing one block of one expert does to its layer's output, and through it to the model's loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.gptq import round_with_hessian
from vllm_ext.compress.hessian import measure_moments, minimum_tokens, spread_rows, weigh_tokens
from vllm_ext.compress.linear_error import measure_linears
from vllm_ext.compress.progress import track
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rounded_layer import round_inputs
from vllm_ext.compress.rounding import QuantizedWeight, dequantize, round_to_nearest
from vllm_ext.compress.sensitivity import Unit
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import LayerStream, StreamedLayer
from vllm_ext.quantization.scheme import Scheme

#: Tokens of the layer that together count as one token of every expert: one that calibration missed is rare, not free.
SPREAD_TOKENS = 64

#: How the codes that are measured are chosen.
_ROUNDINGS = ("rtn", "gptq")

#: Tokens of one product.
_CHUNK_TOKENS = 8192

#: Blocks that are measured together; one at a time spends its time in the calls.
_CHUNK_BYTES = 256 * 2**20


class Sensitivities(NamedTuple):
    """Cost of each option of each unit, float64 [units, options]; 0 for w16a16, inf where an option does not fit.

    layer: squared Frobenius norm of the change of the layer's output, over all calibration tokens. loss: expected rise
    of the mean token loss in nats, None where no gradients were taken.
    """

    layer: np.ndarray
    loss: np.ndarray | None


def measure_sensitivities(
    source: SourceModel,
    units: Sequence[Unit],
    windows: np.ndarray,
    *,
    gradients: bool = True,
    rounding: str = "rtn",
    sweeps: int = SWEEPS,
    cache: StageCache | None = None,
    progress: bool = False,
) -> Sensitivities:
    """Measure every unit with each of its schemes and all else unquantized: blocks of experts, or, in a model without
    experts, groups of linears (`linear_error`).

    windows: int64 [windows, context]. gradients: also measure the loss. rounding: "rtn", or "gptq" for codes chosen
    with the block's own inputs; sweeps: of `refine.refine_codes` over those. cache: where finished layers are kept and
    looked for; its key must name everything else that is given here. One layer is in memory at a time, gradients and
    activations wait on the disk.

    layer: MxMoE's norm, squared, since squares of independent errors add up; routing weights included, over the
    layer's tokens. loss: half the mean over tokens of (loss gradient at the layer's output * change)**2, summed over
    the hidden dimensions: the diagonal of the empirical Fisher matrix.
    Raises ValueError for a unit that is no block of an expert among those that are, and for damaged weights.

    Source: layer_out_norm of MxMoE (arXiv:2505.05799, section 4.1); GEMQ's cost (arXiv:2605.23078), taken at the
    granularity of blocks and scaled to nats.
    """
    if rounding not in _ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r} of sensitivities; known: {', '.join(_ROUNDINGS)}")
    choose_codes = partial(_round_with_inputs, sweeps=sweeps) if rounding == "gptq" else _round_nearest
    dense = all(unit.module.expert is None for unit in units)
    rows: dict[int, dict[tuple[int, str], int]] = {}
    for row, unit in enumerate(units):
        if (unit.module.expert is None and not dense) or unit.module.layer is None:
            raise ValueError(f"{unit.module.path} is not an expert: its sensitivity is not measured")
        # A dense layer's groups are told apart by their paths alone.
        key = (-1, unit.module.path) if unit.module.expert is None else (unit.module.expert, unit.block.name)
        rows.setdefault(unit.module.layer, {})[key] = row
    columns = max(len(unit.options) for unit in units)
    found = np.full((2, len(units), columns), np.inf)
    missing = set()
    for layer, places in rows.items():
        stored = None if cache is None else cache.load(f"sensitivity-{layer}")
        if stored is None:
            missing.add(layer)
        else:
            found[:, list(places.values())] = stored.numpy()
    if missing:
        stream = LayerStream(source, windows)
        with tempfile.TemporaryDirectory(prefix="gradients-") as scratch:
            store = cache or StageCache(Path(scratch), {})
            if gradients:
                _store_gradients(stream, missing, store, progress)
            scored = windows.shape[0] * (windows.shape[1] - 1)
            for streamed in track(stream.layers(), "sensitivity", stream.num_layers, progress):
                if streamed.index not in missing:
                    continue
                places = rows[streamed.index]
                gradient = None
                if gradients:
                    stored = store.load(f"gradient-{streamed.index}")
                    if stored is None:
                        store.discard(f"gradient-{streamed.index}")
                        raise ValueError(f"a file of {store.folder} was damaged: start the command again")
                    gradient = stored.float() * scored
                if dense:
                    passes = sweeps if rounding == "gptq" else None
                    part = measure_linears(streamed, units, list(places.values()), columns, gradient, scored, passes)
                else:
                    part = _measure_layer(streamed, units, places, columns, gradient, scored, choose_codes)
                found[:, list(places.values())] = part
                if cache is not None:
                    cache.store(f"sensitivity-{streamed.index}", part)
                    cache.discard(f"gradient-{streamed.index}")
                missing.discard(streamed.index)
                if not missing:
                    break
    return Sensitivities(found[0], found[1] if gradients else None)


def _store_gradients(stream: LayerStream, wanted: set[int], store: StageCache, progress: bool) -> None:
    """Gradients of the wanted layers, bf16 [tokens, hidden]: eight bits are plenty for a square that is summed."""
    if all(store.has(f"gradient-{layer}") for layer in wanted):
        return
    with store.make_scratch("activations") as folder:
        _write_gradients(stream, wanted, store, folder, progress)


def _write_gradients(stream: LayerStream, wanted: set[int], store: StageCache, folder: Path, progress: bool) -> None:
    for layer, parts in track(stream.loss_gradients(folder), "gradients", stream.num_layers, progress):
        if layer in wanted:
            store.store(f"gradient-{layer}", torch.cat([part.flatten(0, 1) for part in parts]).bfloat16())


def _measure_layer(
    layer: StreamedLayer,
    units: Sequence[Unit],
    places: Mapping[tuple[int, str], int],
    columns: int,
    gradient: torch.Tensor | None,
    scored: int,
    choose_codes: Callable[[Sequence[_Inputs], Scheme], list[QuantizedWeight]],
) -> np.ndarray:
    """float64 [2 (layer, loss), units of this layer, options]; gradient: of the summed loss, [tokens, hidden]."""
    if layer.routed is None:
        raise ValueError(f"layer {layer.index} has no routed experts in the model that transformers builds")
    found = np.full((2, len(places), columns), np.inf)
    position = {key: place for place, key in enumerate(places)}
    with torch.no_grad():
        for chunk in _chunk_blocks(layer, list(places)):
            blocks = {key: _gather(layer, *key, gradient) for key in chunk}
            wanted: dict[Scheme, dict[tuple[int, str], list[int]]] = {}
            for key in chunk:
                for column, scheme in enumerate(units[places[key]].options):
                    if scheme is not None and scheme.is_quantized:
                        wanted.setdefault(scheme, {}).setdefault(key, []).append(column)
                    elif scheme is not None:
                        found[:, position[key], column] = 0.0
            for scheme, asked in wanted.items():
                codes = choose_codes([blocks[key] for key in asked], scheme)
                for (key, same), one in zip(asked.items(), codes, strict=True):
                    weight = dequantize(one, scheme).to(blocks[key].weight.dtype)
                    squares, losses = _measure_change(blocks[key], weight, scheme)
                    for column in same:
                        found[:, position[key], column] = squares, losses / (2 * scored)
    return found


def _chunk_blocks(layer: StreamedLayer, keys: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Blocks of one shape that are measured together, within _CHUNK_BYTES of weights, Hessians and inputs."""
    family, routed = layer.stream.family, layer.routed
    experts = family.find_experts(layer.module)
    assert experts is not None
    assert routed is not None
    # Of an expert of the mean size; inputs, their rounded version and what follows.
    tokens = routed.ids.numel() // max(layer.num_experts, 1) + SPREAD_TOKENS
    for block in dict.fromkeys(block for _, block in keys):
        mine = [key for key in keys if key[1] == block]
        N, K = family.expert_weight(experts, mine[0][0], block).shape
        size = 4 * (10 * N * K + 6 * K * K + 4 * tokens * max(N, K))
        count = max(1, _CHUNK_BYTES // size)
        for start in range(0, len(mine), count):
            yield mine[start : start + count]


class _Inputs(NamedTuple):
    """One block and the tokens it is measured with.

    weight [N, K], name of it. inputs [tokens, K]: those routed here, then the spread ones. after: the down projection
    that follows a gate_up block, and gated [tokens, intermediate], what it is given unquantized; None for down.
    factors [tokens]: routing weights times the square root of how often the token counts. gradient [tokens, hidden],
    of the summed loss. others [tokens, K]: more inputs, for a Hessian of an expert with few. routed: number of its own
    tokens. hessians: those that were measured, by activation bits and their group.
    """

    name: str
    weight: torch.Tensor
    inputs: torch.Tensor
    after: torch.Tensor | None
    gated: torch.Tensor | None
    factors: torch.Tensor
    gradient: torch.Tensor | None
    others: torch.Tensor
    routed: int
    hessians: dict[tuple[int, int], torch.Tensor]


def _gather(layer: StreamedLayer, expert: int, block: str, gradient: torch.Tensor | None) -> _Inputs:
    routed, family = layer.routed, layer.stream.family
    experts = family.find_experts(layer.module)
    assert routed is not None
    assert experts is not None
    rows, routing = routed.find_tokens(expert)
    spread = spread_rows(len(routed.hidden), SPREAD_TOKENS, rows.device)
    usual = float(routed.weights.float().mean()) / max(len(spread), 1) ** 0.5
    factors = torch.cat([routing.float(), torch.full((len(spread),), usual, device=rows.device)])
    rows = torch.cat([rows, spread])
    gate_up, down = (family.expert_weight(experts, expert, name) for name in ("gate_up", "down"))
    inputs = routed.hidden[rows]
    gated = apply_gate(functional.linear(inputs, gate_up))
    own = len(routing)
    weight = gate_up if block == "gate_up" else down
    least = minimum_tokens(weight.shape[1])
    others = routed.hidden[spread_rows(len(routed.hidden), least if own < least else 0, rows.device)]
    if block == "down":
        inputs, others = gated, apply_gate(functional.linear(others, gate_up))
    return _Inputs(
        name=f"{family.layer_prefix(layer.index)}expert {expert}, {block}",
        weight=weight,
        inputs=inputs,
        after=down if block == "gate_up" else None,
        gated=gated if block == "gate_up" else None,
        factors=factors,
        gradient=None if gradient is None else gradient[rows],
        others=others,
        routed=own,
        hessians={},
    )


def _measure_change(block: _Inputs, weight: torch.Tensor, scheme: Scheme) -> tuple[float, float]:
    """(sum of squared changes of the layer's output, sum of squared gradient * change), accumulated in float64."""
    squares = losses = 0.0
    for start in range(0, len(block.inputs), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        inputs = block.inputs[rows]
        rounded = round_inputs(inputs, scheme)
        if block.after is not None:
            assert block.gated is not None
            gated = apply_gate(functional.linear(rounded, weight))
            change = functional.linear(gated - block.gated[rows], block.after)
        elif scheme.act_bits == 16:
            change = functional.linear(inputs, weight - block.weight)
        else:
            change = functional.linear(rounded, weight) - functional.linear(inputs, block.weight)
        change = change.float() * block.factors[rows, None]
        squares += float(change.square().sum(dtype=torch.float64))
        if block.gradient is not None:
            losses += float((change * block.gradient[rows]).square().sum(dtype=torch.float64))
    return squares, losses if block.gradient is not None else np.inf


def _round_nearest(blocks: Sequence[_Inputs], scheme: Scheme) -> list[QuantizedWeight]:
    return [round_to_nearest(block.weight, scheme, block.name) for block in blocks]


def _round_with_inputs(blocks: Sequence[_Inputs], scheme: Scheme, sweeps: int) -> list[QuantizedWeight]:
    """GPTQ on the unquantized path, with the weights and shrinkage of `rounders.HessianRounder`."""
    names = ", ".join(block.name for block in blocks)
    hessians = torch.stack([_measure_hessian(block, scheme) for block in blocks])
    weights = torch.stack([block.weight for block in blocks])
    return round_with_hessian(weights, hessians, scheme, sweeps=sweeps, name=names)


def _measure_hessian(block: _Inputs, scheme: Scheme) -> torch.Tensor:
    key = (16, 0) if scheme.act_bits == 16 else (scheme.act_bits, scheme.group_size)
    if key in block.hessians:
        return block.hessians[key]
    own, routing = block.inputs[: block.routed], block.factors[: block.routed]
    moments = measure_moments(round_inputs(own, scheme), weigh_tokens(routing, 2.0), name=block.name)
    if len(block.others):
        others = measure_moments(round_inputs(block.others, scheme), name=block.name)
        moments = moments.mix(others, block.routed / minimum_tokens(block.weight.shape[1]))
    block.hessians[key] = moments.hessian
    return moments.hessian
