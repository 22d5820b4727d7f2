# SPDX-License-Identifier: Apache-2.0
"""What the simulator compares: no speculation, one length, vLLM's table by batch size, SmartSpec's, an oracle, ours."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.speculation.simulator import K_MAX, NOISE, PASSES, Observation, Plan, TrueCost, Truth
from vllm_ext.speculation.acceptance import USUAL_RATE, find_usual_rate
from vllm_ext.speculation.controller import Batch, FinishedStep, GoodputController
from vllm_ext.speculation.goodput import Choice, DraftCost, choose_lengths, choose_padded, value_drafts
from vllm_ext.speculation.prior import fit_prior
from vllm_ext.speculation.standing import Standing
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

#: (largest batch, length): the example of vLLM's documentation of `num_speculative_tokens_per_batch_size`, in shape.
STOCK_TABLE = ((4, 5), (16, 3), (64, 1))
#: Tokens of the forward passes that the engine measures when it starts, and passes of each size.
SWEEP_SIZES, SWEEP_ROUNDS = (1, 2, 4, 8, 16, 32, 64, 128), 5


class FixedLength:
    """The same length for every request at every step; 0 asks for no drafts."""

    def __init__(self, length: int) -> None:
        self.length = length

    def trim(self, batch: Batch, given: np.ndarray, is_probe: bool, truth: Truth) -> np.ndarray:
        """All of them."""
        return given

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """`length` for all."""
        return Plan(np.full(len(batch.request_ids), self.length, np.int64))

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""


class StockTable(FixedLength):
    """vLLM's dynamic speculation: the length by the number of running requests."""

    def __init__(self) -> None:
        super().__init__(0)

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """The table's length for all."""
        count = len(batch.request_ids)
        self.length = next((length for limit, length in STOCK_TABLE if count <= limit), 0)
        return super().plan(batch, truth)


class Published(FixedLength):
    """SmartSpec as its paper has it (arXiv:2406.14066, sections 4.1 to 4.3), told the true cost.

    One moving average of accepted / drafted for all requests, one length for the whole batch, the one with the most
    expected tokens over time. The paper does not say what it does when nothing is drafted and nothing is learned; here
    the average drifts back to where it began, so that it drafts again.
    """

    def __init__(self, initial: float = 0.7, memory: float = 0.9) -> None:
        super().__init__(0)
        self._initial, self._memory = initial, memory
        self._rate = initial

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """The best length for all, by tokens over time of this step."""
        lengths, count = np.arange(K_MAX + 1), len(batch.request_ids)
        passes = np.array(PASSES[truth.cost.drafter])
        drafted = count * (passes if passes.any() else lengths)
        same = np.full(K_MAX + 1, count)
        context = same * 0 + batch.context_tokens
        features = np.stack([count * (lengths + 1), context, same, passes, drafted, lengths > 0], axis=1)
        tokens = np.cumsum(self._rate**lengths)
        self.length = int(np.argmax(tokens / truth.cost.measure_many(features)))
        return super().plan(batch, truth)

    def observe(self, observation: Observation) -> None:
        """Moves the average."""
        drafted = int(observation.drafted.sum())
        rate = float(observation.accepted.sum()) / drafted if drafted else self._initial
        self._rate += (1 - self._memory) * (rate - self._rate)


class Oracle:
    """The best lengths of each step for the true chances and the true cost: told the rates, not the outcomes.

    By the objective that ours has (`goodput`), step by step, with averages of what its own steps are expected to make:
    no bound of what is possible, but close to it.
    """

    def __init__(self) -> None:
        self._survival = np.zeros((0, K_MAX))
        #: Expected tokens of a step on average: by request, in the order they come, and of all.
        self._usual, self._shared = np.zeros(0), 1.0
        self._stretch, self._steps = 1.0, 0
        self._cost: TrueCost | None = None

    def trim(self, batch: Batch, given: np.ndarray, is_probe: bool, truth: Truth) -> np.ndarray:
        """The drafts that are worth a place in the forward pass; a model's were chosen for the same requests."""
        if PASSES[truth.cost.drafter][-1]:
            return given
        return self._choose(batch, given, truth, True).lengths

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """The exact answer."""
        self._survival, self._cost = np.cumprod(truth.hazards, axis=1), truth.cost
        return Plan(self._choose(batch, K_MAX, truth, False).lengths)

    def observe(self, observation: Observation) -> None:
        """Averages what was expected of the step; its outcomes are not looked at."""
        assert self._cost is not None
        ids, features = self._find(observation.request_ids), observation.features
        made = 1 + (self._survival * (np.arange(K_MAX) < observation.drafted[:, None])).sum(axis=1)
        self._steps += 1
        rate = find_usual_rate(self._steps)
        self._usual[ids] += rate * (made - self._usual[ids])
        self._shared += rate * (float(made.mean()) - self._shared)
        plain = features._replace(tokens=features.requests, passes=0, drafted=0, verifies=0)
        self._stretch += rate * (self._cost.measure(features) / self._cost.measure(plain) - self._stretch)

    def _find(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """Request ids as places in the averages, which begin at that of all."""
        ids = np.array(request_ids, np.int64)
        more = int(ids.max()) + 1 - len(self._usual)
        self._usual = np.concatenate([self._usual, np.full(max(0, more), self._shared)])
        return ids

    def _choose(self, batch: Batch, caps: np.ndarray | int, truth: Truth, is_made: bool) -> Choice:
        survival = np.cumprod(truth.hazards, axis=1)
        count, names, passes = len(survival), truth.cost.coefficients, PASSES[truth.cost.drafter]
        features = StepFeatures(batch.tokens, batch.context_tokens, count, 0, 0)
        plain = TrueCost(names).measure(features)
        if is_made:
            cost = DraftCost(plain, names["tokens"])
        elif passes[-1]:
            cost = DraftCost(plain, names["tokens"], names["passes"] + count * names["drafted"])
        else:
            cost = DraftCost(plain, names["tokens"] + names["drafted"])
        cost = cost._replace(once=names["verifies"])
        ids = self._find(batch.request_ids)
        values = value_drafts(survival, self._usual[ids], USUAL_RATE)
        price = count / (self._stretch * truth.cost.measure(features))
        if truth.cost.graph_sizes:
            sizes = truth.cost.graph_sizes
            return choose_padded(survival, values, caps, cost, price, names["tokens"], batch.tokens, sizes, passes)
        return choose_lengths(survival, values, caps, cost, price, passes)


class Hold(NamedTuple):
    """Steps that a plan of ours stands for, and whether these trim its drafts by the newest outcomes."""

    steps: int
    trims: bool


#: Every step has a plan of its own.
HOLD = Hold(1, True)


class Ours:
    """The controller of the pack, as the engine has it: told the drafter's passes, the sizes of captured graphs, and
    what a sweep of forward passes took before serving."""

    def __init__(self, cost: TrueCost, prior: Mapping[str, float] | None, hold: Hold = HOLD) -> None:
        """cost: for the sizes of graphs and the drafter's kind, which the engine's configuration says. prior: of a
        sweep (`measure_prior`); None for none."""
        self.controller = GoodputController(
            K_MAX, step_time=StepTimeModel(prior), passes=PASSES[cost.drafter], graph_sizes=cost.graph_sizes
        )
        self._hold, self._stood = hold, 1
        self._standing: Standing | None = None
        self._seen: list[FinishedStep] = []

    def trim(self, batch: Batch, given: np.ndarray, is_probe: bool, truth: Truth) -> np.ndarray:
        """The controller's choice among the drafts."""
        last, standing = self._standing, self._find_standing(batch)
        if standing is None:
            self._end_plan()
        if last is not None and last.covers(len(batch.request_ids)) and last.keeps_all(int(given.sum())):
            return given
        if standing is not None:
            return self.controller.trim_again(batch, given)
        return self.controller.trim_drafts(batch, given, is_probe)

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """The controller's lengths, or those of a plan that stands; its average for requests that came later."""
        standing = self._find_standing(batch)
        if standing is not None:
            self._stood += 1
            self._standing = standing.follow(batch.request_ids)
            return Plan(np.fromiter(self._standing.lengths.values(), np.int64))
        self._end_plan()
        # So long that nothing could be saved.
        trim_time = 0.0 if self._hold.trims else math.inf
        decision = self.controller.plan_drafts(batch, self._stood, trim_time)
        self._stood = 1
        # Here a model gives each request its own length; in the engine all get the longest, and the trim cuts them.
        if decision.may_stand:
            lengths = dict(zip(batch.request_ids, decision.lengths.tolist(), strict=True))
            self._standing = Standing.begin(self._hold.steps, lengths, decision.trims)
        return Plan(decision.lengths, decision.is_probe)

    def observe(self, observation: Observation) -> None:
        """As the scheduler mixin does where drafts are trimmed at every step."""
        ids, drafted, accepted, features, milliseconds, is_probe = observation
        counts = drafted.tolist(), accepted.tolist(), (accepted + 1).tolist()
        self._seen.append(FinishedStep(ids, *counts, features, milliseconds, is_probe, is_noted=True))
        self.controller.note(ids, *counts[:2])
        if self._standing is None or not self._standing.lasts(self._stood):
            self._learn()

    def _find_standing(self, batch: Batch) -> Standing | None:
        """An earlier step's plan that is these requests' too."""
        standing = self._standing
        if standing is None or not standing.lasts(self._stood) or not standing.covers(len(batch.request_ids)):
            return None
        return standing

    def _end_plan(self) -> None:
        self._standing = None
        self._learn()

    def _learn(self) -> None:
        if self._seen:
            self.controller.observe(self._seen)
            self.controller.forget(dict.fromkeys(self._seen[-1].request_ids))
        self._seen = []


def measure_prior(cost: TrueCost, seed: int) -> dict[str, float]:
    """What the engine's sweep at its start finds: passes of the target model without context, and of the drafter."""
    rng = np.random.default_rng(seed)

    def measure(milliseconds: float) -> float:
        return float(np.median(milliseconds * rng.lognormal(0, NOISE, SWEEP_ROUNDS)))

    target = {size: measure(cost.measure(StepFeatures(size, 0, 0, 0, 0))) for size in SWEEP_SIZES}
    if not PASSES[cost.drafter][-1]:
        return fit_prior(target)
    names = cost.coefficients
    return fit_prior(target, {size: measure(names["passes"] + names["drafted"] * size) for size in SWEEP_SIZES})
