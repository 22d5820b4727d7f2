# SPDX-License-Identifier: Apache-2.0
"""semi-PD's controller as its paper has it, to compare with ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from vllm_ext.scheduling.phases.controller import Decision, Objectives, Split

#: Values that the paper does not give: percent that a step moves, steps of one decision, decode steps of a window.
STEP, MAX_STEPS, WINDOW = 5, 4, 50
LOWEST = 10


class PublishedController:
    """Algorithm 1: every window, refit TTFT(x) = a1 / (x - lambda) + b1 and TPOT(y) = a2 / y + b2; where one objective
    alone is violated, raise its share in steps until the model meets it; where both or none are, change nothing.

    x and y are percent and their sum may exceed 100, when what counts is 100 x / (x + y).

    Source: semi-PD (arXiv:2504.19867, section 5, Eq. 1 to 4 and Algorithm 1). Latencies of the window are taken at the
    objectives' quantile.
    """

    def __init__(self, objectives: Objectives, *, x: float = 50, y: float = 50, window: int = WINDOW) -> None:
        """x, y: percent for prefill and decode to begin with. window: decode steps between decisions."""
        self._objectives = objectives
        self._x, self._y, self._window = float(x), float(y), window
        self._ttft: deque[float] = deque(maxlen=256)
        self._tpot: deque[float] = deque(maxlen=256)
        self._seen: list[deque[tuple[float, float]]] = [deque(maxlen=32), deque(maxlen=32)]
        self._steps = 0

    @property
    def split(self) -> Split:
        """The split that was decided last."""
        total = max(100.0, self._x + self._y)
        return Split(self._x / total, self._y / total)

    def observe_arrival(self, now: float, tokens: int) -> None:
        """Nothing is learned."""

    def observe_prefill(self, started: float, finished: float, tokens: int, share: float) -> None:
        """Nothing is learned."""

    def observe_first_token(self, arrived: float, now: float) -> None:
        """Counts in the window."""
        self._ttft.append(now - arrived)

    def observe_decode(self, started: float, finished: float, share: float) -> None:
        """A step of the window, and a sample of TPOT."""
        self._tpot.append(finished - started)
        self._steps += 1

    def observe_mixed(self, started: float, finished: float, prompt_tokens: int) -> None:
        """Nothing is learned: Algorithm 1 does not mix."""

    def observe_finished(self, first_token: float, now: float, tokens: int) -> None:
        """Nothing is learned."""

    def note_switch(self, now: float) -> None:
        """A new window begins."""
        self._ttft.clear()
        self._tpot.clear()

    def decide(self, now: float, queued_tokens: int) -> Decision:
        """Algorithm 1, once a window has passed; queued_tokens is not looked at."""
        if self._steps < self._window or not self._ttft or not self._tpot:
            return Decision(self.split, 0.0, 0.0, None, False)
        self._steps = 0
        quantile = self._objectives.quantile
        ttft, tpot = float(np.quantile(self._ttft, quantile)), float(np.quantile(self._tpot, quantile))
        self._ttft.clear()
        self._tpot.clear()
        before = (self._x, self._y)
        total = self._x + self._y
        self._seen[0].append((100 * self._x / total, ttft))
        self._seen[1].append((100 * self._y / total, tpot))
        first_late, further_late = ttft > self._objectives.ttft, tpot > self._objectives.tpot
        if first_late and not further_late:
            self._x, self._y = self._raise(self._x, self._y, *fit_ttft(self._seen[0]), self._objectives.ttft)
        elif further_late and not first_late:
            self._y, self._x = self._raise(self._y, self._x, *fit_tpot(self._seen[1]), self._objectives.tpot)
        return Decision(self.split, ttft, tpot, None, (self._x, self._y) != before)

    @staticmethod
    def _raise(mine: float, other: float, a: float, free: float, b: float, objective: float) -> tuple[float, float]:
        for _ in range(MAX_STEPS):
            if a / max(100 * mine / (mine + other) - free, 1e-3) + b <= objective:
                break
            if mine + STEP <= 100:
                mine += STEP
            else:
                other = max(LOWEST, other - STEP)
        return mine, other


class NearestPublishedController(PublishedController):
    """Algorithm 1 on a device that can do a few splits: it decides as ever, and the one nearest to that is taken."""

    def __init__(self, splits: Sequence[Split], objectives: Objectives, *, window: int = WINDOW) -> None:
        """splits: what the device can do; the first one is that in the middle. Raises ValueError for none."""
        if not splits:
            raise ValueError("Algorithm 1 needs at least one split to take")
        first = splits[len(splits) // 2]
        super().__init__(objectives, x=100 * first.prefill, y=100 * first.decode, window=window)
        self._splits = list(splits)

    @property
    def split(self) -> Split:
        """The split that was decided last."""
        wanted = super().split
        return min(
            self._splits, key=lambda split: abs(split.prefill - wanted.prefill) + abs(split.decode - wanted.decode)
        )

    def decide(self, now: float, queued_tokens: int) -> Decision:
        """As Algorithm 1; a change that no split is nearer to is none."""
        before = self.split
        decision = super().decide(now, queued_tokens)
        return decision._replace(is_switch=decision.split != before)


def fit_tpot(seen: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, 0, b) of latency = a / share + b, by least squares; b = 0 where one share alone was seen."""
    return _fit(seen, 0.0)[1:]


def fit_ttft(seen: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, lambda, b) of latency = a / (share - lambda) + b, lambda by search below the smallest share."""
    lowest = min(share for share, _ in seen)
    fits = [_fit(seen, free) for free in np.linspace(0, 0.95 * lowest, 39).tolist()]
    # Few points fit with any lambda: the smallest one extrapolates least.
    return min(fits, key=lambda fit: (round(fit[0], 12), fit[2]))[1:]


def _fit(seen: Sequence[tuple[float, float]], free: float) -> tuple[float, float, float, float]:
    """(squared error, a, free, b)."""
    shares, times = np.array(seen).T
    rows = np.stack([1 / (shares - free), np.ones(len(shares))], axis=1)
    if np.ptp(shares) < 1e-3:
        a, b = float(times[-1] * (shares[-1] - free)), 0.0
    else:
        a, b = np.linalg.lstsq(rows, times, rcond=None)[0].tolist()
        if a <= 0:
            a, b = float(times[-1] * (shares[-1] - free)), 0.0
    return float(((rows @ np.array([a, b]) - times) ** 2).sum()), a, free, b
