# SPDX-License-Identifier: Apache-2.0
"""What the simulator compares: no speculation, one length, vLLM's table by batch size, SmartSpec's, an oracle, ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bench.speculation.simulator import K_MAX, Observation, TrueCost, Truth
from vllm_ext.speculation.controller import Batch, GoodputController
from vllm_ext.speculation.goodput import DraftCost, choose_padded
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


class Published:
    """SmartSpec as its paper has it (arXiv:2406.14066, sections 4.1 to 4.3), told the true cost.

    One moving average of accepted / drafted for all requests, one length for the whole batch, the one with the most
    expected tokens over time. The paper does not say what it does when nothing is drafted and nothing is learned; here
    the average drifts back to where it began, so that it drafts again.
    """

    def __init__(self, passes_per_draft: int = 1, initial: float = 0.7, memory: float = 0.9) -> None:
        self._passes_per_draft = passes_per_draft
        self._initial, self._memory = initial, memory
        self._rate = initial

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """The best length for all, by tokens over time of this step."""
        count = len(batch.request_ids)
        goodput = []
        for length in range(K_MAX + 1):
            tokens = count * sum(self._rate**j for j in range(length + 1))
            features = StepFeatures(
                count * (length + 1), batch.context_tokens, count, length * self._passes_per_draft, count * length
            )
            goodput.append(tokens / truth.cost.measure(features))
        return np.full(count, int(np.argmax(goodput)), np.int64)

    def observe(self, observation: Observation) -> None:
        """Moves the average."""
        drafted = int(observation.drafted.sum())
        rate = float(observation.accepted.sum()) / drafted if drafted else self._initial
        self._rate += (1 - self._memory) * (rate - self._rate)


class Oracle:
    """The best lengths for the true chances and the true cost: told the rates, not the outcomes."""

    def __init__(self, passes_per_draft: int = 1) -> None:
        self._passes_per_draft = passes_per_draft

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """The exact answer."""
        survival = np.cumprod(truth.hazards, axis=1)
        count, names = len(survival), truth.cost.coefficients
        plain = TrueCost(names).measure(StepFeatures(batch.tokens, batch.context_tokens, count, 0, 0))
        cost = DraftCost(plain, names["tokens"] + names["drafted"], names["passes"] * self._passes_per_draft)
        caps = np.full(count, K_MAX)
        return choose_padded(survival, caps, cost, names["tokens"], batch.tokens, truth.cost.graph_sizes).lengths

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""


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
