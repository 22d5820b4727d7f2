# SPDX-License-Identifier: Apache-2.0
"""Calibration of a model's KV cache for a preset: run the model, calibrate its layers, keep what helps."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.calibration import CalibrationError, load_tokenizer, make_windows
from vllm_ext.compress.profile import load_model
from vllm_ext.compress.progress import track
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.calibrate_attention import (
    Angles,
    AttentionLayer,
    Recorded,
    Sides,
    find_angles,
    find_layers,
    measure_output_error,
    record_layers,
)
from vllm_ext.kv_cache.calibration import calibrate_layer
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS, Preset, get_preset
from vllm_ext.kv_cache.sidecar import describe_model, write_sidecar

#: Windows of calibration text. KVQuant takes 16 of 2048 tokens, SKVQ 256 of 4096.
NUM_WINDOWS = 32
#: Share of the windows that is held out: what does not lower the error there is not kept.
HELD_OUT_SHARE = 0.25
#: Bytes of queries, keys and values that one pass over the text may keep; more layers take more passes.
PASS_BYTES = 2**31

NOTHING: Sides = (CodecTensors(), CodecTensors())


@dataclass(frozen=True)
class LayerReport:
    """One layer. plain, calibrated: relative errors of its attention output on held-out text. kept: fields in use."""

    name: str
    plain: float
    calibrated: float
    kept: dict[str, list[str]]


@dataclass(frozen=True)
class CalibrationReport:
    """What was done: bits are true bits of an element, the window left out; tokens of calibration and held-out text."""

    preset: str
    output: str
    head_dim: int
    num_kv_heads: int
    bits: float
    tokens: int
    held_out_tokens: int
    seed: int
    seconds: float
    layers: list[LayerReport]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "plain_error": self.mean("plain"), "calibrated_error": self.mean("calibrated")}

    def mean(self, name: str) -> float:
        """Mean over layers of "plain" or "calibrated"."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))


@dataclass(frozen=True)
class Task:
    """A loaded model with its text. calibration, held_out: int64 [windows, tokens]."""

    model: Any
    layers: list[AttentionLayer]
    calibration: torch.Tensor
    held_out: torch.Tensor

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.layers[0].head_dim

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values, of the whole model."""
        return self.layers[0].num_kv_heads

    @property
    def description(self) -> str:
        """What the calibration file says of the model."""
        return describe_model(self.model.config.get_text_config())


def find_preset(name: str) -> Preset:
    """The preset to calibrate. Raises CalibrationError with the nearest name for one that does not exist."""
    if name == PLAN_NAME:
        raise CalibrationError(
            f"{PLAN_NAME} has a preset for every layer and no calibration of its own: "
            "search the layers' bits with --bits B and --plan FILE"
        )
    try:
        return get_preset(name)
    except ValueError as error:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"presets are {', '.join(PRESETS)}"
        raise CalibrationError(f"{name!r} is not a KV-cache preset; {hint}") from error


def load_task(
    directory: Path, sources: Sequence[str | Path], *, seed: int, context: int, num_windows: int, dtype: str = "auto"
) -> Task:
    """Read model and text. Raises CalibrationError for text or a model that cannot be used, naming the fix."""
    if not (directory / "config.json").is_file():
        raise CalibrationError(f"{directory} is not a model directory (it has no config.json): give one")
    if num_windows < 2:
        raise CalibrationError(
            f"{num_windows} windows cannot be divided into calibration and held-out text: take 2 or more"
        )
    known = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    windows = torch.from_numpy(
        make_windows(
            sources,
            load_tokenizer(directory),
            seed=seed,
            context=context,
            num_windows=num_windows,
            vocab_size=known,
        )
    )
    if len(windows) < 2:
        raise CalibrationError(
            f"the text has one window of {context} tokens, and two are needed: give more, or a smaller --context"
        )
    # Drawn, not cut off: the windows of a source lie together.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(windows)))
    held_out = max(1, round(len(windows) * HELD_OUT_SHARE))
    model = load_model(directory, dtype if dtype == "auto" else getattr(torch, dtype))
    return Task(
        model, find_layers(model), windows[order[held_out:].sort().values], windows[order[:held_out].sort().values]
    )


def calibrate_model(
    task: Task, preset: Preset, output: Path, *, seed: int = 0, progress: bool = False
) -> CalibrationReport:
    """Calibrate every layer and write the file that `kv_cache.calibration` names.

    The result of a layer is kept where it lowers the error of the layer's attention output on held-out text; a layer
    of which nothing is kept has no tensors in the file. The same model, text and seed give the same bytes. Raises
    CalibrationError where no layer gains, ValueError for a head size that the preset does not fit.
    """
    began = time.monotonic()
    fitted = preset.fit(task.head_dim)
    check_context(task, fitted)
    angles = find_angles(task.model, task.calibration.shape[1]) if preset.pre_rope else None
    windows = torch.cat([task.calibration, task.held_out])
    reports: list[LayerReport] = []
    kept: dict[str, Sides] = {}
    for layer, recorded in track(record_passes(task, windows), f"calibrate {preset.name}", len(task.layers), progress):
        report, sides = _calibrate_recorded(layer, recorded, len(task.calibration), fitted, angles, seed)
        reports.append(report)
        kept[layer.cache_name] = NOTHING if sides is None else sides
    if all(sides is NOTHING for sides in kept.values()):
        raise CalibrationError(
            f"calibration lowers the held-out error of no layer with {preset.name}: serve it without, or give more "
            "text like that the model will see"
        )
    write_sidecar(output, kept, preset, task.num_kv_heads, task.head_dim, task.description)
    return CalibrationReport(
        preset=preset.name,
        output=str(output),
        head_dim=task.head_dim,
        num_kv_heads=task.num_kv_heads,
        bits=preset.bits(task.head_dim),
        tokens=task.calibration.numel(),
        held_out_tokens=task.held_out.numel(),
        seed=seed,
        seconds=time.monotonic() - began,
        layers=reports,
    )


def check_context(task: Task, preset: Preset) -> None:
    """Raises CalibrationError where windows are so short that everything is read in full precision."""
    context, full = task.held_out.shape[1], preset.window + preset.sinks + preset.extra_window
    if context <= full:
        raise CalibrationError(
            f"windows of {context} tokens are all within the {full} that {preset.name} keeps in full precision: "
            f"give a --context well above {full}"
        )


def record_passes(task: Task, windows: torch.Tensor) -> Iterator[tuple[AttentionLayer, Recorded]]:
    """Every layer with what goes into it on windows, int64 [windows, tokens], in few passes and bounded memory."""
    first = task.layers[0]
    element = next(task.model.parameters()).element_size()
    bytes_of_layer = windows.numel() * (first.num_heads + 2 * first.num_kv_heads) * first.head_dim * element
    at_once = max(1, PASS_BYTES // bytes_of_layer)
    for start in range(0, len(task.layers), at_once):
        group = task.layers[start : start + at_once]
        recorded = record_layers(task.model, windows, [layer.name for layer in group])
        for layer in group:
            yield layer, recorded.pop(layer.name)


def _calibrate_recorded(
    layer: AttentionLayer, recorded: Recorded, count: int, preset: Preset, angles: Angles | None, seed: int
) -> tuple[LayerReport, Sides | None]:
    """Calibrate on the first `count` windows, judge on the others."""
    query, key, value = (x[:count].float() for x in recorded)
    if angles is not None:
        query, key = angles.turn(query, inverse=True), angles.turn(key, inverse=True)
    sides = calibrate_layer(key.flatten(0, 1), value.flatten(0, 1), preset, query.flatten(0, 1), seed)
    held_out = Recorded(*(x[count:] for x in recorded))
    arms = [NOTHING, sides, (sides[0], CodecTensors()), (CodecTensors(), sides[1])]
    errors = [measure_output_error(held_out, preset, arm, layer.scaling, angles) for arm in arms]
    best = min(range(len(arms)), key=errors.__getitem__)
    kept = {
        side: [field for field, tensor in tensors._asdict().items() if tensor is not None]
        for side, tensors in zip(("key", "value"), arms[best], strict=True)
    }
    chosen = arms[best] if any(kept.values()) else None
    return LayerReport(layer.name, errors[0], errors[best], kept), chosen
