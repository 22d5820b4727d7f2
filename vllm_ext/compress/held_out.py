# SPDX-License-Identifier: Apache-2.0
"""Whether a mixed plan is better than a uniform one: their loss on calibration text that neither was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.progress import track
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rounded_layer import build_rounded_layer
from vllm_ext.compress.rounders import make_rounder
from vllm_ext.compress.sequential import name_layer, round_layer, split_plan
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.plan import Plan

#: One window in this many is held out.
HELD_OUT_SHARE = 4


@dataclass(frozen=True)
class Comparison:
    """Mean token losses (nats) on held-out windows, all with the same rounding.

    full: of the unquantized model. equal: of the mixed plan made for exactly the uniform plan's bytes. mixed: of the
    mixed plan for the whole budget. uniform_scheme: of its first block.
    """

    tokens: int
    full: float
    uniform: float
    equal: float
    mixed: float
    uniform_bits: float
    equal_bits: float
    mixed_bits: float
    uniform_scheme: str

    @property
    def mixed_wins(self) -> bool:
        """Whether mixing is better within the budget, and not worse at equal bytes.

        A uniform plan of the smallest scheme there is leaves nothing to mix at its bytes: then both are the same.
        """
        return self.equal <= self.uniform and self.mixed < self.uniform

    @property
    def closed(self) -> float:
        """Share of the uniform plan's distance to the unquantized model that mixing removes within the budget."""
        return self._close(self.mixed)

    @property
    def closed_at_equal_bytes(self) -> float:
        """The same with exactly the uniform plan's bytes."""
        return self._close(self.equal)

    def _close(self, loss: float) -> float:
        gap = self.uniform - self.full
        return (self.uniform - loss) / gap if gap > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "held_out_tokens": self.tokens,
            "full_loss": self.full,
            "uniform": {"scheme": self.uniform_scheme, "bits": self.uniform_bits, "loss": self.uniform},
            "mixed_at_equal_bytes": {"bits": self.equal_bits, "loss": self.equal},
            "mixed": {"bits": self.mixed_bits, "loss": self.mixed},
            "gap_closed": self.closed,
            "gap_closed_at_equal_bytes": self.closed_at_equal_bytes,
            "mixed_wins": self.mixed_wins,
        }


def split_held_out(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(windows to calibrate with, windows held out); none is held out where there are too few."""
    if len(windows) < HELD_OUT_SHARE:
        return windows, windows[:0]
    # Every n-th, so that each source gives its share.
    held = np.arange(len(windows)) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    return windows[~held], windows[held]


def count_windows(used: int) -> int:
    """Windows to draw so that `used` of them remain after `split_held_out`."""
    return used + max(1, (used - 1) // (HELD_OUT_SHARE - 1))


def measure_plans(
    source: SourceModel,
    plans: Sequence[Plan],
    windows: np.ndarray,
    *,
    rounding: str = "rtn",
    sweeps: int = SWEEPS,
    calibration: np.ndarray | None = None,
    cache: StageCache | None = None,
    progress: bool = False,
) -> tuple[float, list[float]]:
    """Mean token loss in nats of the unquantized model and of every plan, on windows int64 [windows, context].

    rounding, sweeps: see `rounders.make_rounder`. calibration: windows it chooses codes with, not needed by "rtn".
    cache: where each layer's codes are kept until all plans are measured; its key must name the model and the
    calibration windows. All plans go through the model together, a layer at a time; weights and activations are what
    the kernels compute with, in float32. Raises ValueError for a rounding that needs calibration windows without any.
    """
    stream = LayerStream(source, windows)
    driver = stream
    if rounding != "rtn":
        if calibration is None or not len(calibration):
            raise ValueError(f"rounding {rounding} needs calibration windows")
        driver = LayerStream(source, calibration)
    full = stream.embed()
    paths: list[list[torch.Tensor]] = [full for _ in plans]
    prefixes = [_prefix_layers(rounding, sweeps, plan) for plan in plans]
    # Rounding to nearest is quicker than reading what it gave.
    kept = None if rounding == "rtn" else cache
    rounders = [make_rounder(rounding, sweeps) for _ in plans]
    for layer in track(driver.layers(), "held-out loss", driver.num_layers, progress):
        full = layer.outputs if driver is stream else stream.run(layer.module, full)
        for number, (plan, rounder) in enumerate(zip(plans, rounders, strict=True)):
            rounded = round_layer(layer, plan, rounder, kept, prefixes[number])
            module = build_rounded_layer(layer, *split_plan(source, plan, layer.index), rounded)
            paths[number] = stream.run(module, paths[number])
    return stream.loss(full), [stream.loss(path) for path in paths]


def drop_layers(
    source: SourceModel, plans: Sequence[Plan], cache: StageCache, *, rounding: str = "rtn", sweeps: int = SWEEPS
) -> None:
    """Remove from the cache what `measure_plans` kept there: once its result is stored."""
    layers = {module.layer for module in source.modules.values() if module.layer is not None}
    for plan in plans:
        for layer in layers:
            cache.discard(name_layer(layer, _prefix_layers(rounding, sweeps, plan)))


def _prefix_layers(rounding: str, sweeps: int, plan: Plan) -> str:
    return f"{rounding}-{sweeps}-{plan.sha256[:16]}-"
