# SPDX-License-Identifier: Apache-2.0
"""The best lengths of a step by what is believed of its requests and of the machine."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.acceptance import USUAL_RATE, AcceptanceModel
from vllm_ext.speculation.goodput import (
    Choice,
    DraftCost,
    choose_lengths,
    choose_padded,
    choose_uniform,
    value_drafts,
)
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

#: (measured steps, longest draft below so many).
FIRST_LENGTHS = ((8, 1), (16, 3))
#: Where all requests have one length, a change of it must promise this part of a usual step: noise is not followed.
HYSTERESIS = 0.01
#: Part of the time of drafts that trimming them by the newest outcomes is expected to win. Simulated, it wins 0.13 % of
#: a step over all loads; measured, less than it takes at 4 requests, and about 1 % of the step at 32.
TRIM_SHARE = 0.025
#: Steps of a batch seldom have more than two thirds of the sizes that they could have.
SHAPE_SLACK = 1.5


#: Weights of requests by id: what progress of each is worth, 1 for most. Deadlines and priorities enter here.
Policy = Callable[[Sequence[Hashable]], np.ndarray]


class Batch(NamedTuple):
    """The requests of a step."""

    request_ids: Sequence[Hashable]
    #: Of the step without drafts: one for a decoding request, and what it has of prompts.
    tokens: int
    #: Of KV cache that attention reads.
    context_tokens: int


class Outlook(NamedTuple):
    """What is believed of a batch's drafts: chances [n, k_max], what they are worth (`value_drafts`) and a millisecond
    is, and weights of the requests, None for 1."""

    batch: Batch
    survival: np.ndarray
    values: np.ndarray
    price: float
    weights: np.ndarray | None


class Decision(NamedTuple):
    """Draft lengths by request, int64 [n], and what is expected of the step that verifies them."""

    lengths: np.ndarray
    expected_tokens: float
    expected_milliseconds: float
    is_probe: bool
    #: Whether steps that follow may have these lengths too: not those of a trial.
    may_stand: bool = False
    #: Whether such steps should verify only those of their drafts that are still worth it.
    trims: bool = True


def find_share(steps: int) -> float:
    """Of what requests usually make, the part that comes from so many steps with the same lengths."""
    return 1 - (1 - USUAL_RATE) ** steps


class LengthChooser:
    """The best lengths (`goodput`): of drafts to make for the next step, and of drafts that are made."""

    def __init__(
        self,
        k_max: int,
        acceptance: AcceptanceModel,
        step_time: StepTimeModel,
        *,
        uniform_lengths: Sequence[int] | None,
        graph_sizes: Sequence[int],
        passes: Sequence[int] | None,
        policy: Policy | None,
        trims: bool,
        kept_shapes: int,
        is_ragged: bool,
    ) -> None:
        """As `GoodputController`. Raises ValueError for lengths that k_max does not allow, and for passes that do not
        fit it."""
        if uniform_lengths is not None and (0 not in uniform_lengths or max(uniform_lengths) > k_max):
            raise ValueError(f"uniform lengths {list(uniform_lengths)} need 0 and nothing above k_max={k_max}")
        passes = [0] * (k_max + 1) if passes is None else list(passes)
        if len(passes) != k_max + 1 or passes[0] < 0 or passes != sorted(passes):
            raise ValueError(
                f"passes {passes} need {k_max + 1} numbers that do not fall, one for each length 0..{k_max}"
            )
        self.k_max = k_max
        self.acceptance = acceptance
        self.step_time = step_time
        self._uniform = None if uniform_lengths is None else sorted(set(uniform_lengths))
        self._graph_sizes = sorted(graph_sizes)
        self._passes, self._has_passes = passes, passes[-1] > 0
        self._policy = policy
        self._kept_shapes = kept_shapes
        #: Whether more may be drafted than is verified: where that takes no pass of a model, what the outcome of the
        #: step in between says of each request is known when its drafts are trimmed.
        self._drafts_ahead = trims and self._uniform is None and not self._has_passes
        self._trims, self._is_ragged = trims, is_ragged
        #: What a millisecond is worth and drafts take by the last plan, as long as it stands.
        self._standing_price, self._standing_cost = 0.0, DraftCost(1.0, 0.0)
        #: The length chosen last where all have the same one.
        self._last_length = 0
        #: Of the step's trim, until its plan.
        self._last_outlook: Outlook | None = None
        #: Passes and positions of the drafter that the last plan asked for: they are part of a step's time.
        self._drafting = (passes[0], 0)
        #: How much longer a step usually takes than it would without drafts and prompts.
        self._stretch = 1.0
        #: Steps that the last plan stood for, and the next one is likely to.
        self._stood = 1

    def predict(self, features: StepFeatures) -> float:
        """Milliseconds of a step, tokens without padding."""
        return self.step_time.predict(self._pad(features))

    def describe_step(self, batch: Batch, verified: int, lengths: np.ndarray) -> StepFeatures:
        """Features of a step that verifies so many drafts and makes drafts of these lengths for the next one."""
        passes, count = self._passes[int(lengths.max(initial=0))], len(batch.request_ids)
        drafted = count * passes if self._has_passes else int(np.add.reduce(lengths))
        return StepFeatures(batch.tokens + verified, batch.context_tokens, count, passes, drafted, int(verified > 0))

    def _look_ahead(self, batch: Batch) -> Outlook:
        slots, last = self.acceptance.find_slots(batch.request_ids), self._last_outlook
        survival = self.acceptance.predict_survival(slots)
        if last is not None and last.survival is survival:
            # The same array: the same requests, of whom nothing was learned since they were looked at for trimming.
            return last._replace(batch=batch)
        weights = None if self._policy is None else self._policy(batch.request_ids)
        count = len(batch.request_ids)
        total = float(count if weights is None else np.add.reduce(weights))
        price = total / (self._stretch * self._predict_plain(count, batch.context_tokens))
        self._last_outlook = self._value(batch, slots, survival, price, weights)
        return self._last_outlook

    def _value(
        self, batch: Batch, slots: np.ndarray, survival: np.ndarray, price: float, weights: np.ndarray | None
    ) -> Outlook:
        """What drafts with these chances are worth."""
        usual = self.acceptance.find_usual(slots)
        values = value_drafts(survival, usual, find_share(self._stood), weights)
        return Outlook(batch, survival, values, price, weights)

    def _predict_plain(self, num_requests: int, context_tokens: int) -> float:
        """Milliseconds of a step without drafts, drafting and prompts."""
        return self.predict(StepFeatures(num_requests, context_tokens, num_requests, 0, 0))

    def _limit_unknown(self) -> int:
        """Short drafts until a few steps have been measured: on a compute-bound machine long ones cost most there."""
        if self.step_time.is_prior_measured:
            return self.k_max
        observed = self.step_time.num_observed
        return next((limit for steps, limit in FIRST_LENGTHS if observed < steps), self.k_max)

    def _describe_cost(self, batch: Batch) -> DraftCost:
        features = StepFeatures(batch.tokens, batch.context_tokens, len(batch.request_ids), 0, 0)
        return self.step_time.describe_cost(features, self._has_passes)

    def _describe_verification(self, batch: Batch) -> DraftCost:
        features = StepFeatures(batch.tokens, batch.context_tokens, len(batch.request_ids), *self._drafting)
        return self.step_time.describe_verification(features)

    def _choose(self, outlook: Outlook, cost: DraftCost) -> Choice:
        limit = self._limit_unknown()
        if self._uniform is None:
            return self._choose_each(outlook, limit, cost)
        allowed = [length for length in self._uniform if length <= limit]
        count = len(outlook.survival)
        times = [
            cost.fixed
            + length * cost.per_token * count
            + cost.per_pass * self._passes[length]
            + (cost.once if length else 0.0)
            for length in allowed
        ]
        # Graphs make a change of length cheap, but following noise is not free either. Of a usual step, since the time
        # of a prompt passes with any length.
        bonus = HYSTERESIS * count / outlook.price if count else 0.0
        costs = [
            time - bonus if length == self._last_length else time for length, time in zip(allowed, times, strict=True)
        ]
        choice = choose_uniform(outlook.survival, outlook.values, allowed, costs, outlook.price)
        self._last_length = int(choice.lengths.max(initial=0))
        return choice._replace(milliseconds=times[allowed.index(self._last_length)])

    def _choose_each(self, outlook: Outlook, caps: np.ndarray | int, cost: DraftCost) -> Choice:
        batch, survival, values, price, _ = outlook
        if self._graph_sizes:
            padding, sizes = self.step_time.coefficients["tokens"], self._graph_sizes
            return choose_padded(survival, values, caps, cost, price, padding, batch.tokens, sizes, self._passes)
        return choose_lengths(survival, values, caps, cost, price, self._passes)

    def _find_most(self, outlook: Outlook, cost: DraftCost) -> np.ndarray:
        """The longest drafts that are likely to be worth verifying once the outcome of this step is known: int64 [n].

        Outcomes are tried one step ahead, also for a plan that stands for more: two good steps say hardly more than
        one. Where steps are padded, all requests share the padding here, and one alone may want more.
        """
        return self._choose_by(outlook, self.acceptance.predict_best, cost).lengths

    def _choose_by(self, outlook: Outlook, predict: Callable[[np.ndarray], np.ndarray], cost: DraftCost) -> Choice:
        """The best lengths by other chances than those of `outlook`; predict: these of slots."""
        batch, slots = outlook.batch, self.acceptance.find_slots(outlook.batch.request_ids)
        other = self._value(batch, slots, predict(slots), outlook.price, outlook.weights)
        return self._choose_each(other, self._limit_unknown(), cost)

    def _is_worth_trimming(self, lengths: np.ndarray, cost: DraftCost, trim_time: float) -> bool:
        """Whether drafts of a plan of these lengths should be trimmed in each of its steps, for that many milliseconds.

        cost: of verifying them. Always where the drafter makes the longest number for all, and where sizes of steps
        matter, which only the drafts that there are can be cut to.
        """
        if not trim_time:
            return True
        if (not self._is_ragged and len(lengths) > 1) or self._find_multiple(len(lengths)) > 1:
            return True
        return TRIM_SHARE * cost.per_token * float(np.add.reduce(lengths)) > trim_time

    def _find_multiple(self, count: int) -> int:
        """What the tokens of a step of so many requests should be a multiple of, so that its shape is likely to be one
        of the kept ones: a power of two, for batches of all sizes to have shapes in common."""
        if not self._kept_shapes:
            return 1
        return 1 << max(0, math.ceil(math.log2(count * (self.k_max + 1) / (SHAPE_SLACK * self._kept_shapes))))

    def _describe_decision(self, outlook: Outlook, lengths: np.ndarray, is_probe: bool) -> Decision:
        """Lengths that are not those of a choice, with what is expected of them."""
        taken = np.arange(self.k_max) < lengths[:, None]
        tokens = len(lengths) + float((outlook.survival * taken).sum())
        features = self.describe_step(outlook.batch, int(lengths.sum()), lengths)
        return Decision(lengths, tokens, self.predict(features), is_probe)

    def _pad(self, features: StepFeatures) -> StepFeatures:
        sizes = self._graph_sizes
        if not sizes or features.tokens > sizes[-1]:
            return features
        return features._replace(tokens=sizes[bisect.bisect_left(sizes, features.tokens)])
