# SPDX-License-Identifier: Apache-2.0
"""Round a model layer by layer along the quantized path, keeping every finished layer on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.cache import StageCache, hash_array, hash_source
from vllm_ext.compress.families import Kind
from vllm_ext.compress.progress import track
from vllm_ext.compress.rounded_layer import list_path_schemes
from vllm_ext.compress.rounders import Rounder, list_constants
from vllm_ext.compress.rounding import QuantizedWeight
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import BATCH_WINDOWS, LayerStream, StreamedLayer
from vllm_ext.quantization.checkpoint import pack_weight
from vllm_ext.quantization.plan import ExpertSchemes, Plan
from vllm_ext.quantization.scheme import Scheme


def make_cache(folder: Path, source: SourceModel, windows: np.ndarray, key: Mapping[str, Any]) -> StageCache:
    """Where the layers of one run are kept.

    key: what else decides the codes, JSON-ready: the rounder and its options, the rotation, the plan.
    """
    fixed = {"stage": "rounding", "source": hash_source(source), "windows": hash_array(windows)}
    return StageCache(folder, {**fixed, "constants": list_constants(), **key})


def round_layers(
    source: SourceModel,
    plan: Plan,
    rounder: Rounder,
    windows: np.ndarray,
    *,
    cache: StageCache | None = None,
    batch_windows: int = BATCH_WINDOWS,
    progress: bool = False,
) -> Iterator[tuple[int, dict[str, QuantizedWeight]]]:
    """(layer, {checkpoint path of a linear: codes}) for every decoder layer, in order.

    source: the model, rotated or not. plan: its quantized modules. rounder: fresh, see `rounders.ROUNDERS`. windows:
    calibration tokens, int64 [windows, context]. cache: layers that it holds are not rounded again, only run; the
    same windows in the same batches give the same codes as a run without it.
    """
    stream = LayerStream(source, windows, batch_windows=batch_windows)
    for layer in track(stream.layers(), "round layers", stream.num_layers, progress):
        yield layer.index, round_layer(layer, plan, rounder, cache)


def round_layer(
    layer: StreamedLayer, plan: Plan, rounder: Rounder, cache: StageCache | None = None, prefix: str = ""
) -> dict[str, QuantizedWeight]:
    """{checkpoint path of a linear: codes} of one layer: those the cache holds, else chosen now and kept there.

    prefix: of the name in the cache, where that holds the layers of several plans.
    """
    source = layer.stream.source
    schemes, linears = split_plan(source, plan, layer.index)
    paths = list_path_schemes(source, layer.index, schemes, linears)
    name = name_layer(layer.index, prefix)
    stored = None if cache is None else _load(cache, name, paths)
    if stored is not None:
        rounder.replay_layer(layer, schemes, linears, stored)
        return stored
    rounded = rounder.round_layer(layer, schemes, linears)
    if cache is not None:
        _store(cache, name, rounded, paths)
    return rounded


def name_layer(layer: int, prefix: str = "") -> str:
    """What a finished layer is called in a cache."""
    return f"{prefix}layer-{layer}"


def split_plan(source: SourceModel, plan: Plan, layer: int) -> tuple[dict[tuple[int, str], Scheme], dict[str, Scheme]]:
    """What a plan says of one layer: {(expert, block): scheme} and {path of another linear: scheme}."""
    schemes: dict[tuple[int, str], Scheme] = {}
    linears: dict[str, Scheme] = {}
    for path, value in plan.modules.items():
        module = source.modules[path]
        if module.layer != layer:
            continue
        if isinstance(value, ExpertSchemes):
            assert module.kind is Kind.EXPERT
            assert module.expert is not None
            schemes.update({(module.expert, block): scheme for block, scheme in value._asdict().items()})
        else:
            linears[path] = value
    return schemes, linears


def read_layer(source: SourceModel, plan: Plan, layer: int, cache: StageCache) -> dict[str, QuantizedWeight]:
    """The codes of a layer that `round_layers` finished with this cache. Raises ValueError where it did not."""
    stored = _load(cache, name_layer(layer), list_path_schemes(source, layer, *split_plan(source, plan, layer)))
    if stored is None:
        raise ValueError(f"layer {layer} is not in {cache.folder}: it was removed during the run; start it again")
    return stored


def _store(cache: StageCache, name: str, rounded: Mapping[str, QuantizedWeight], paths: Mapping[str, Scheme]) -> None:
    tensors = {}
    for path, codes in rounded.items():
        tensors.update({f"{path}.{suffix}": value for suffix, value in pack_weight(*codes, paths[path]).items()})
    # A layer that the plan leaves alone has nothing to keep, and an empty file says that it was done.
    cache.store(name, tensors or [])


def _load(cache: StageCache, name: str, paths: Mapping[str, Scheme]) -> dict[str, QuantizedWeight] | None:
    """The codes of a finished layer; None where it is not there."""
    stored = cache.load(name)
    if stored is None:
        return None
    tensors: dict[str, torch.Tensor] = stored or {}
    rounded = {}
    for path, scheme in paths.items():
        codes = scheme.unpack_codes(tensors[f"{path}.qweight"])
        rounded[path] = QuantizedWeight(codes, tensors[f"{path}.scales"], tensors.get(f"{path}.zeros"))
    return rounded
