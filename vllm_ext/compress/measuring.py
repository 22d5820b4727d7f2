# SPDX-License-Identifier: Apache-2.0
"""What a plan is made from: profile, costs and shares of tokens, measured or taken from an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.compress.cache import StageCache, hash_array, hash_source
from vllm_ext.compress.families import Kind
from vllm_ext.compress.hessian import minimum_tokens
from vllm_ext.compress.layer_error import SPREAD_TOKENS, measure_sensitivities
from vllm_ext.compress.profile import ActivationProfile, stream_profile
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rounders import list_constants
from vllm_ext.compress.sensitivity import Unit, measure_weight_errors, weigh_by_frequency
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.safetensors_io import CheckpointError

#: Windows that sensitivities are measured with, spread over those of calibration; more changed no plan by much.
SENSITIVITY_WINDOWS = 32


def open_cache(
    work: Path,
    source: SourceModel,
    units: Sequence[Unit],
    windows: np.ndarray,
    measure: str,
    rounding: str,
    sweeps: int = SWEEPS,
) -> StageCache:
    """Where the profile and the sensitivities of these windows, options and weights are kept."""
    probe = _probe_rounding(rounding)
    names = [[unit.module.path, unit.block.name, *map(str, unit.options)] for unit in units]
    key = {
        "stage": "plan",
        "source": hash_source(source),
        "windows": hash_array(windows),
        "options": names,
        "gradients": True,
        "rounding": probe,
        "sweeps": None if probe == "rtn" else sweeps,
        "constants": {
            **list_constants(),
            "sensitivity_windows": SENSITIVITY_WINDOWS,
            "spread_tokens": SPREAD_TOKENS,
        },
    }
    cache = StageCache(work, key)
    if measure == "loss" or all(
        cache.load(f"sensitivity-{unit.module.layer}") is not None for unit in units if unit.module.layer is not None
    ):
        # With gradients the change of the layer's output is measured too.
        return cache
    return StageCache(work, {**key, "gradients": False})


def _probe_rounding(rounding: str) -> str:
    """How sensitivities round: every code by the block's own inputs where the codes will be chosen by inputs."""
    return "rtn" if rounding == "rtn" else "gptq"


def load_profile(
    source: SourceModel, windows: np.ndarray, cache: StageCache | None, progress: bool
) -> ActivationProfile:
    stored = None if cache is None else cache.load("profile")
    if stored is not None:
        return ActivationProfile.from_json(stored)
    profile = stream_profile(source, windows, progress=progress)
    if cache is not None:
        cache.store("profile", profile.to_json())
    return profile


def measure_losses(
    source: SourceModel,
    units: Sequence[Unit],
    measure: str,
    windows: np.ndarray,
    profile: ActivationProfile | None,
    rounding: str,
    sweeps: int,
    cache: StageCache | None,
    progress: bool,
) -> np.ndarray:
    """What each option costs each unit, float64 [units, options].

    Raises ValueError naming the layer and the block whose cost is NaN.
    """
    if measure == "weight":
        errors = measure_weight_errors(source, units, progress=progress)
        return weigh_by_frequency(errors, units, profile, count_layer_experts(source))
    count = min(SENSITIVITY_WINDOWS, len(windows))
    spread = windows[np.arange(count) * len(windows) // count]
    found = measure_sensitivities(
        source,
        units,
        spread,
        gradients=measure == "loss",
        rounding=_probe_rounding(rounding),
        sweeps=sweeps,
        cache=cache,
        progress=progress,
    )
    losses = found.layer if measure == "layer" else found.loss
    assert losses is not None
    damaged = np.isnan(losses).any(axis=1)
    if damaged.any():
        unit = units[int(damaged.argmax())]
        raise ValueError(
            f"the sensitivity of {unit.module.path} {unit.block.name} is NaN: a weight of its layer, or of the layers "
            f"before or after it, is damaged; copy the checkpoint again"
        )
    return losses


def describe_shortage(windows: np.ndarray, wanted: int) -> list[str]:
    """A sentence where the text gave fewer windows than were asked for."""
    if len(windows) >= wanted:
        return []
    return [f"calibration text has {len(windows)} windows of {windows.shape[1]} tokens, not the {wanted} asked for"]


def describe_rare_experts(profile: ActivationProfile, units: Sequence[Unit]) -> list[str]:
    """A sentence where experts get fewer tokens than their own statistics need (`hessian.minimum_tokens`)."""
    widest: dict[tuple[str, int], int] = {}
    for unit in units:
        if unit.module.expert is not None:
            place = unit.module.path.rpartition(".")[0], unit.module.expert
            widest[place] = max(widest.get(place, 0), unit.block.K)
    short = [
        int(profile.counts[layer][expert])
        for (layer, expert), K in widest.items()
        if profile.counts[layer][expert] < minimum_tokens(K)
    ]
    if not short:
        return []
    text = (
        f"{len(short)} of {len(widest)} experts get fewer calibration tokens than their own statistics need, the "
        f"rarest {min(short)}: other tokens of their layer fill up; more text or --balanced gives them more"
    )
    return [text]


def find_shares(source: SourceModel, units: Sequence[Unit], profile: ActivationProfile | None) -> np.ndarray:
    """Probability that a token passes each unit, float64 [units]."""
    counts = count_layer_experts(source)
    top_k = count_top_k(source.config) if counts else 0
    shares = np.ones(len(units))
    for row, unit in enumerate(units):
        if unit.module.expert is not None:
            layer = unit.module.path.rpartition(".")[0]
            frequency = 1 / counts[layer] if profile is None else profile.frequencies(layer)[unit.module.expert]
            shares[row] = min(1.0, top_k * frequency)
    return shares


def count_top_k(config: Mapping[str, Any]) -> int:
    """Experts that a token is routed to. Raises CheckpointError where config.json does not say."""
    value = config.get("num_experts_per_tok")
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has num_experts_per_tok = {value!r}, expected a positive number")
    return value


def count_layer_experts(source: SourceModel) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in source.modules.values():
        if module.kind is Kind.EXPERT:
            layer = module.path.rpartition(".")[0]
            counts[layer] = counts.get(layer, 0) + 1
    return counts
