# SPDX-License-Identifier: Apache-2.0
"""A server for tests of the controller: requests that never finish, served as the engine does it.

A step trims the drafts that the step before asked for, plans the next ones, and only then notes what came of it, from
which is learned before the next plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.controller import Batch, FinishedStep, GoodputController
from vllm_ext.speculation.standing import Standing
from vllm_ext.speculation.step_time import COEFFICIENTS, StepFeatures

#: Milliseconds of a step where every token counts.
COMPUTE_BOUND = {**dict.fromkeys(COEFFICIENTS, 0.0), "step": 3.0, "tokens": 0.9}
NOISE = 0.06


class Step(NamedTuple):
    """What a step verified by request, what it planned, whether that is a probe, tokens that are expected of it under
    the true chance, milliseconds, what these would be without any draft, and whether the plan is an earlier step's."""

    verified: np.ndarray
    planned: np.ndarray
    is_probe: bool
    tokens: float
    milliseconds: float
    plain: float
    is_standing: bool


class Server:
    """One batch under one controller. matches: share of a lookup's searches that find anything."""

    def __init__(
        self,
        controller: GoodputController,
        cost: Mapping[str, float],
        count: int,
        *,
        passes: list[int] | None = None,
        trims: bool = True,
        asks: int | None = None,
        hold: int = 1,
        seed: int = 0,
    ) -> None:
        """asks: drafts of each request where their number is not planned. hold: steps that a plan stands for."""
        self.controller, self.cost, self.count = controller, cost, count
        self.k_max = controller.k_max
        self._passes = passes or [0] * (self.k_max + 1)
        self._trims, self._asks = trims, asks
        self._rng = np.random.default_rng(seed)
        self._given, self._is_probe = np.zeros(count, np.int64), False
        self._hold, self._stood = hold, 1
        self._standing: Standing | None = None
        #: Outcomes that were noted and not learned from yet.
        self._seen: list[FinishedStep] = []

    def serve(self, chance: float, steps: int, matches: float = 1.0) -> list[Step]:
        """Steps of drafts that are accepted with one chance."""
        return [self._step(chance, matches) for _ in range(steps)]

    def find_best(self, chance: float) -> float:
        """Tokens per millisecond of the best fixed length."""
        plain = self.measure(StepFeatures(self.count, 1000 * self.count, self.count, 0, 0))
        found = []
        for length in range(self.k_max + 1):
            extra = self.cost["tokens"] * self.count * length + self.cost["passes"] * self._passes[length]
            made = self.count * sum(chance**place for place in range(length + 1))
            found.append(made / (plain + extra))
        return max(found)

    def measure(self, features: StepFeatures) -> float:
        return self.cost["step"] + sum(self.cost[name] * value for name, value in features._asdict().items())

    def _step(self, chance: float, matches: float) -> Step:
        count, batch = self.count, Batch(list(range(self.count)), self.count, 1000 * self.count)
        kept, was_probe = self._given, self._is_probe
        standing = self._standing
        if standing is not None and not standing.lasts(self._stood):
            standing = self._standing = None
        if standing is None:
            self.controller.observe(self._seen)
            self._seen = []
        if self._trims and kept.any():
            if standing is None:
                kept = self.controller.trim_drafts(batch, kept, was_probe)
            else:
                kept = self.controller.trim_again(batch, kept)
        lengths = np.full(count, self._asks or 0)
        if standing is not None:
            self._stood += 1
            lengths = np.array(list(standing.lengths.values()), np.int64)
        elif self._asks is None:
            decision = self.controller.plan_drafts(batch, self._stood)
            lengths, self._is_probe, self._stood = decision.lengths, decision.is_probe, 1
            if decision.may_stand:
                self._standing = Standing.begin(self._hold, dict(enumerate(lengths.tolist())))
        passes = self._passes[int(lengths.max())]
        drafted = count * passes if self._passes[-1] else int(lengths.sum())
        verified = int(kept.sum())
        features = StepFeatures(count + verified, batch.context_tokens, count, passes, drafted, int(verified > 0))
        time = self.measure(features)
        passed = np.cumprod(self._rng.random((count, self.k_max)) < chance, axis=1).sum(axis=1)
        accepted, measured = np.minimum(passed, kept), time * self._rng.lognormal(0, NOISE)
        counts = kept.tolist(), accepted.tolist(), (accepted + 1).tolist()
        self.controller.note(batch.request_ids, *counts[:2])
        self._seen.append(FinishedStep(batch.request_ids, *counts, features, measured, was_probe, is_noted=True))
        self._given = np.where(self._rng.random(count) < matches, lengths, 0) if matches < 1 else lengths
        made = count + float((chance ** np.arange(1, self.k_max + 1) * (np.arange(self.k_max) < kept[:, None])).sum())
        plain = self.measure(StepFeatures(count, batch.context_tokens, count, self._passes[0], 0))
        return Step(kept, lengths, was_probe, made, time, plain, standing is not None)


def measure_goodput(steps: list[Step]) -> float:
    """Tokens per millisecond."""
    return sum(step.tokens for step in steps) / sum(step.milliseconds for step in steps)


def find_recovery(steps: list[Step], length: float, window: int = 20) -> int:
    """Steps until the mean of verified drafts over a window reaches `length`, the window included."""
    means = np.convolve([step.verified.mean() for step in steps], np.ones(window) / window, "valid")
    reached = np.flatnonzero(means >= length)
    return int(reached[0]) + window if len(reached) else len(steps)
