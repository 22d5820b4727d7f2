# SPDX-License-Identifier: Apache-2.0
"""How bits are chosen, as the user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllm_ext.compress.time_model import DEFAULT_BATCHES

#: What a block's schemes are judged by.
MEASURES = ("weight", "layer", "loss")


@dataclass(frozen=True)
class PlanOptions:
    """How bits are chosen, beyond how many. Raises ValueError for values that make no sense, alone or together.

    measure: one of MEASURES, see `layer_error` for layer and loss and `sensitivity` for weight; None: loss with
    calibration text, else weight. per_layer: give every layer the same bits (MxMoE). time_weight: cost, in the
    measure's unit, of a microsecond of the batches on the device. max_time_us: limit of that time. exponent: MxMoE's
    r, which minimizes loss**r * time**(1 - r); for per_layer alone. exact: the optimum by mixed-integer programming,
    for small models; the usual way is within a fraction of a percent of it.
    device, tables, batches: see `time_model`. compare: on held-out windows with a uniform plan. force_mixed: keep the
    mixed plan where the uniform one is better. work: folder where measurements are kept for the next run.
    """

    measure: str | None = None
    per_layer: bool = False
    exponent: float = 1.0
    time_weight: float = 0.0
    max_time_us: float | None = None
    exact: bool = False
    device: str = "cpu"
    tables: Path | None = None
    batches: Mapping[int, float] = field(default_factory=lambda: dict(DEFAULT_BATCHES))
    compare: bool = True
    force_mixed: bool = False
    work: Path | None = None

    def __post_init__(self) -> None:
        if self.measure is not None and self.measure not in MEASURES:
            raise ValueError(f"unknown measure {self.measure!r} of sensitivity; known: {', '.join(MEASURES)}")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"the exponent of loss must be from 0 to 1, got {self.exponent}")
        if self.exponent != 1 and not self.per_layer:
            raise ValueError("an exponent belongs to the allocation per layer; with the global one use a time weight")
        if self.per_layer and (self.time_weight or self.max_time_us is not None):
            raise ValueError("the allocation per layer weighs time by its exponent, not by a weight or a limit")
        if self.exact and (self.per_layer or self.max_time_us is not None):
            raise ValueError("the exact solver knows the global allocation without a limit of time alone")
        if not (np.isfinite(self.time_weight) and self.time_weight >= 0):
            raise ValueError(f"the weight of time must not be negative, got {self.time_weight}")
        if self.max_time_us is not None and not (np.isfinite(self.max_time_us) and self.max_time_us > 0):
            raise ValueError(f"the limit of time must be positive, got {self.max_time_us}")

    @property
    def weighs_time(self) -> bool:
        """Whether time has a say in the choice."""
        return self.time_weight > 0 or self.max_time_us is not None or self.exponent < 1
