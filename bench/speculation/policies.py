# SPDX-License-Identifier: Apache-2.0
"""What the simulator compares: no speculation, one length, vLLM's table by batch size, an oracle, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bench.speculation.simulator import K_MAX, Observation, Truth
from vllm_ext.speculation.controller import Batch, GoodputController
from vllm_ext.speculation.goodput import DraftCost, choose_lengths
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

#: (largest batch, length): the example of vLLM's documentation of `num_speculative_tokens_per_batch_size`, in shape.
STOCK_TABLE = ((4, 5), (16, 3), (64, 1))


class FixedLength:
    """The same length for every request at every step; 0 is no speculation."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """`length` for all."""
        return np.full(len(batch.request_ids), self.length, np.int64)

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""


class StockTable:
    """vLLM's dynamic speculation: the length by the number of running requests."""

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """The table's length for all."""
        count = len(batch.request_ids)
        return np.full(count, next((length for limit, length in STOCK_TABLE if count <= limit), 0), np.int64)

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""


class Oracle:
    """The best lengths for the true chances and the true cost."""

    def __init__(self, passes_per_draft: int = 1) -> None:
        self._passes_per_draft = passes_per_draft

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """Best of the linear program's answer and, where steps are stairs, of filling each stair."""
        survival = np.cumprod(truth.hazards, axis=1)
        count = len(survival)
        caps = np.full(count, K_MAX)
        names = truth.cost.coefficients
        base = StepFeatures(batch.tokens, batch.context_tokens, count, 0, 0)
        per_token = names["tokens"] + names["drafted"]
        cost = DraftCost(truth.cost.measure(base), per_token, names["passes"] * self._passes_per_draft)
        candidates = [choose_lengths(survival, caps, cost).lengths]
        # Stairs: the best drafts that fill each padded size exactly.
        order = np.argsort(-survival, axis=None, kind="stable")
        for size in truth.cost.graph_sizes:
            if count <= size <= count * (K_MAX + 1):
                taken = np.zeros(survival.size, bool)
                taken[order[: size - count]] = True
                candidates.append(taken.reshape(survival.shape).sum(axis=1))
        return max(candidates, key=lambda lengths: self._measure(lengths, survival, batch, truth))

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""

    def _measure(self, lengths: np.ndarray, survival: np.ndarray, batch: Batch, truth: Truth) -> float:
        count, drafted = len(lengths), int(lengths.sum())
        passes = int(lengths.max(initial=0)) * self._passes_per_draft
        tokens = count + (survival * (np.arange(K_MAX) < lengths[:, None])).sum()
        features = StepFeatures(count + drafted, batch.context_tokens, count, passes, drafted)
        return float(tokens) / truth.cost.measure(features)


class Ours:
    """The controller of the pack, told nothing but its own observations."""

    def __init__(
        self, passes_per_draft: int = 1, graph_sizes: Sequence[int] = (), prior: Mapping[str, float] | None = None
    ) -> None:
        """graph_sizes: as in the engine's own configuration. prior: what an earlier engine stored; None for none."""
        self._sizes = sorted(graph_sizes)
        self.controller = GoodputController(
            K_MAX, step_time=StepTimeModel(prior), passes_per_draft=passes_per_draft, graph_sizes=graph_sizes
        )

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """The controller's lengths."""
        return self.controller.plan_drafts(batch).lengths

    def observe(self, observation: Observation) -> None:
        """As the scheduler mixin does after a step."""
        ids, drafted, accepted, features, milliseconds = observation
        padded = next((size for size in self._sizes if size >= features.tokens), features.tokens)
        features = features._replace(tokens=padded)
        self.controller.observe(ids, drafted, accepted, features, milliseconds)
        self.controller.forget(dict.fromkeys(ids))
