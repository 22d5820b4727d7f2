# SPDX-License-Identifier: Apache-2.0
"""What batches of both phases cost, from the times of either phase on the whole device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from vllm_ext.scheduling.phases.latency import FULL, ShareModel, find_ttft_quantile, follow

#: Mixed batches that count in the ratio of their time to that of their prompts and of a step, one after the other.
MEMORY = 50
#: How far what is measured may move the model, either way.
CORRECTION = 2.0
#: A gap between two tokens counts as one so many times as long does in the mean of a request: readers see it, and the
#: mean hides it among short ones.
GAP = 3.0


class MixedModel:
    """TTFT and TPOT where prompts go into the batches of decode.

    A batch takes the time of its prompt tokens and that of a step, both on the whole device, times a ratio that is
    measured: below 1 where weights are read once for both. Prompts take what part of the time they take, and steps
    share the rest; no batch is longer than one that is full. How much prompt work falls into a request's time varies as
    a compound Poisson process does, so that few long prompts are worse than many short ones. Both latencies are
    corrected by what is measured while batches are mixed. And everybody waits for the batch that a long prompt is in,
    which no lane has: where the longest gap of a request is far above its mean it counts in its place.
    """

    def __init__(self, budget: int, quantile: float, token_time: ShareModel, step_time: ShareModel) -> None:
        """budget: tokens of a batch. token_time, step_time: fits of the seconds of a prompt token and of a step.

        Raises ValueError for a budget below 1.
        """
        if budget < 1:
            raise ValueError(f"mix_budget {budget} must be at least one token")
        self._budget, self._quantile = budget, quantile
        self._token_time, self._step_time = token_time, step_time
        self._ratio = self._ttft_correction = self._tpot_correction = 1.0
        #: Seconds from token to token at the quantile, without what their longest gap counts for, as predicted last.
        self.pace = 0.0

    @property
    def token(self) -> float:
        """Seconds of a prompt token in a full batch, with its part of the step."""
        return (self._token_time.predict(1.0) + self._step_time.predict(1.0) / self._budget) * self._ratio

    def observe(self, time: float, prompt_tokens: int) -> None:
        """A batch of so many prompt tokens, and a token of everyone who decodes, took so many seconds."""
        expected = self._step_time.predict(1.0) + prompt_tokens * self._token_time.predict(1.0)
        if expected > 0:
            self._ratio = follow(self._ratio, time / expected, 1 / MEMORY, CORRECTION)

    def predict(
        self, prompts: np.ndarray, rate: float, queued_tokens: int, outputs: Sequence[int]
    ) -> tuple[float, float]:
        """(TTFT, TPOT) at the quantile, in seconds. prompts: tokens of samples of who comes in, at so many a second;
        outputs: tokens that requests put out.
        """
        step = self._step_time.predict(1.0) * self._ratio
        first = self._measure_queue(prompts, rate) * self._ttft_correction
        # Who comes now waits for those who are here, and for the batch in flight.
        first = max(first, (queued_tokens + float(prompts.mean())) * self.token) + step
        self.pace = self._measure_pace(prompts, rate, outputs) * self._tpot_correction
        arrivals = rate * sum(outputs) / max(len(outputs), 1) * self.pace
        return first, max(self.pace, self._measure_gap(prompts, arrivals) / GAP)

    def correct(
        self, prompts: np.ndarray, rate: float, outputs: Sequence[int], ttft: float | None, tpot: float | None
    ) -> None:
        """Move both latencies towards what was measured at the quantile while batches were mixed, where it was."""
        if ttft is not None:
            ratio = ttft / self._measure_queue(prompts, rate)
            self._ttft_correction = follow(self._ttft_correction, ratio, 0.3, CORRECTION)
        if tpot is not None:
            ratio = tpot / self._measure_pace(prompts, rate, outputs)
            self._tpot_correction = follow(self._tpot_correction, ratio, 0.3, CORRECTION)

    def _measure_queue(self, prompts: np.ndarray, rate: float) -> float:
        return float(find_ttft_quantile(prompts * self.token, rate, self._quantile))

    def _measure_gap(self, prompts: np.ndarray, arrivals: float) -> float:
        """The longest gap of a request at the quantile, in seconds. arrivals: prompts that come in while it decodes."""
        # Nobody comes in of whom less than so many are expected, for the quantile of requests.
        seldom = -math.log(self._quantile)
        if arrivals <= seldom:
            return 0.0
        tokens = min(float(np.quantile(prompts, 1 - seldom / arrivals)), self._budget)
        return (self._step_time.predict(1.0) + tokens * self._token_time.predict(1.0)) * self._ratio

    def _measure_pace(self, prompts: np.ndarray, rate: float, outputs: Sequence[int]) -> float:
        token, step = (model.predict(1.0) * self._ratio for model in (self._token_time, self._step_time))
        full, services = step + self._budget * token, prompts * token
        mean = step / (1 - min(rate * float(services.mean()), FULL))
        if not outputs:
            return full if rate > 0 else step
        deviation = math.sqrt(rate * float((services**2).mean()) * mean / float(np.mean(outputs)))
        return min(mean + NormalDist().inv_cdf(self._quantile) * deviation, full)
