# SPDX-License-Identifier: Apache-2.0
"""Every step's draft lengths: what is verified now, what is drafted next, and what the outcome teaches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.acceptance import AcceptanceModel
from vllm_ext.speculation.goodput import Choice, DraftCost, choose_lengths, choose_padded, choose_uniform
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

#: Steps between two probes while nothing is speculated: at first, wanted while probes tell nothing new, at most, and
#: after one that was accepted more than expected.
PROBE_EVERY, PROBE_WANTED, PROBE_AT_MOST, PROBE_AGAIN = 8, 16, 64, 1
#: What probes may cost, as a share of the time. As many requests are probed as that allows.
PROBE_SHARE = 0.008
#: While requests speculate, one step in so many drafts one more or one less: lengths that never change do not tell what
#: a draft costs. Often at first, then seldom.
EXPLORE_EVERY, EXPLORE_SELDOM, EXPLORE_AT_FIRST = 12, 96, 300
#: (measured steps, longest draft below so many).
FIRST_LENGTHS = ((8, 1), (16, 3))
#: A change of the number of drafting passes must promise this much more goodput: noise is not followed.
HYSTERESIS = 1.01

#: Weights of requests by id: what progress of each is worth, 1 for most. Deadlines and priorities enter here.
Policy = Callable[[Sequence[Hashable]], np.ndarray]


class Batch(NamedTuple):
    """The requests of a step: ids, tokens without drafts (one for a decoding request), and KV tokens read."""

    request_ids: Sequence[Hashable]
    tokens: int
    context_tokens: int


class Decision(NamedTuple):
    """Draft lengths by request, int64 [n], and what is expected of the step that verifies them."""

    lengths: np.ndarray
    expected_tokens: float
    expected_milliseconds: float
    is_probe: bool


class GoodputController:
    """Draft lengths from measured acceptance and measured step time.

    plan_drafts   how much to draft for the next step: drafting and verifying cost
    trim_drafts   how much of given drafts to verify: drafting is paid already
    observe       what a step drafted, accepted and took

    k = 0 is never for ever: when no request has speculated for a while, some are given a short draft now and then,
    less often while that changes nothing, and for a fixed small part of the time. Lengths depend on past outcomes
    only, never on the drafts themselves, so the tokens that come out are those of the target model.

    Source: SmartSpec (arXiv:2406.14066), sections 4.1 to 4.4; per-request lengths, hazards by position, the online
    fit and the probes are ours.
    """

    def __init__(
        self,
        k_max: int,
        *,
        acceptance: AcceptanceModel | None = None,
        step_time: StepTimeModel | None = None,
        uniform_lengths: Sequence[int] | None = None,
        graph_sizes: Sequence[int] = (),
        passes_per_draft: int = 1,
        probe_every: int = PROBE_EVERY,
        policy: Policy | None = None,
    ) -> None:
        """k_max: longest draft.

        uniform_lengths: allowed lengths where all requests must have the same one; None for a length each. graph_sizes:
        tokens that forward passes are padded to. passes_per_draft: 1 for a drafter that is a model and makes one draft
        a pass, 0 for list drafters. probe_every: steps before the first probe. policy: weights of requests.
        Raises ValueError for lengths that k_max does not allow.
        """
        if uniform_lengths is not None and (0 not in uniform_lengths or max(uniform_lengths) > k_max):
            raise ValueError(f"uniform lengths {list(uniform_lengths)} need 0 and nothing above k_max={k_max}")
        self.k_max = k_max
        self.acceptance = acceptance or AcceptanceModel(k_max)
        self.step_time = step_time or StepTimeModel()
        self._uniform = None if uniform_lengths is None else sorted(uniform_lengths)
        self._graph_sizes = sorted(graph_sizes)
        self._passes_per_draft = passes_per_draft
        self._probe_every = self._probe_interval = probe_every
        self._since_draft = self._turn = 0
        #: Whether the last probe was accepted more than expected: the next one asks all requests.
        self._is_surprised = False
        self._steps = 0
        self._last_passes = 0
        self._policy = policy
        #: Slots and weights of the requests that were trimmed, until the next step of them is planned.
        self._weighed: tuple[np.ndarray, np.ndarray] | None = None

    def plan_drafts(self, batch: Batch, caps: np.ndarray | None = None) -> Decision:
        """Draft lengths for the next step of these requests. caps: int [n], the longest allowed; None for k_max."""
        slots = self.acceptance.find_slots(batch.request_ids)
        survival = self.acceptance.predict_survival(slots)
        caps = np.full(len(slots), self.k_max) if caps is None else np.minimum(caps, self.k_max)
        weights = self._weigh(batch, slots)
        self._weighed = None
        cost = self._describe_cost(batch)
        caps = np.minimum(caps, self._limit_unknown())
        choice = self._choose(survival, caps, cost, weights, batch)
        if int(choice.lengths.max(initial=0)) > 0:
            self._since_draft = 0
            self._probe_interval = self._probe_every
            self._last_passes = int(choice.lengths.max())
            lengths = choice.lengths if self._uniform is not None else self._explore(choice.lengths, caps)
            return Decision(lengths, choice.tokens, choice.milliseconds, False)
        self._last_passes = 0
        self._since_draft += 1
        if self._since_draft >= self._probe_interval and caps.max(initial=0) > 0:
            self._since_draft = 0
            lengths = self._make_probe(caps, cost)
            tokens = choice.tokens + float((survival * (np.arange(self.k_max) < lengths[:, None])).sum())
            time = cost.fixed + cost.per_token * int(lengths.sum()) + cost.per_pass * int(lengths.max())
            # Less often while that changes nothing, and never for more than their share of the time.
            longest = (time / cost.fixed - 1) / PROBE_SHARE
            longest = min(max(longest, PROBE_WANTED, self._probe_every), max(PROBE_AT_MOST, self._probe_every))
            self._probe_interval = min(2 * self._probe_interval, int(longest))
            return Decision(lengths, tokens, time, True)
        return Decision(choice.lengths, choice.tokens, choice.milliseconds, False)

    def trim_drafts(self, batch: Batch, drafted: np.ndarray, is_probe: bool = False) -> np.ndarray:
        """How many of each request's drafts to verify, int64 [n], at most `drafted`. A probe is verified whole."""
        if is_probe or not len(drafted):
            return drafted
        slots = self.acceptance.find_slots(batch.request_ids)
        features = StepFeatures(batch.tokens, batch.context_tokens, len(slots), 0, 0)
        cost = self.step_time.describe_cost(features)
        # Only the forward pass is still to be paid.
        paid = DraftCost(cost.fixed, self.step_time.coefficients["tokens"], 0.0)
        weights = self._weigh(batch, slots)
        if weights is not None:
            self._weighed = (slots, weights)
        return choose_lengths(self.acceptance.predict_survival(slots), drafted, paid, weights).lengths

    def observe(
        self,
        request_ids: Sequence[Hashable],
        drafted: np.ndarray,
        accepted: np.ndarray,
        features: StepFeatures | None = None,
        milliseconds: float | None = None,
    ) -> None:
        """Learn from a finished step.

        drafted, accepted: int [n], verified and accepted drafts of each request. features, milliseconds: of the whole
        step; None where its time is not known.
        """
        slots = self.acceptance.find_slots(request_ids)
        tried = drafted > 0
        if self._last_passes == 0 and tried.any():
            # A probe. More success than expected is a change: look again soon, until it is what is expected.
            expected = float(self.acceptance.predict_first(slots[tried]).sum())
            if int((accepted > 0).sum()) > expected + 0.4 * np.sqrt(tried.sum()):
                self._probe_interval, self._is_surprised = PROBE_AGAIN, True
        self.acceptance.observe(slots, drafted, accepted)
        if features is not None and milliseconds is not None:
            self.step_time.observe(features, milliseconds)

    def forget(self, running: Mapping[Hashable, object]) -> None:
        """Drop every request that is not among the running ones."""
        self.acceptance.keep_only(running)  # type: ignore[arg-type]

    def _weigh(self, batch: Batch, slots: np.ndarray) -> np.ndarray | None:
        """The policy's weights, asked for once a step where the same requests are trimmed and planned for."""
        if self._weighed is not None and self._weighed[0] is slots:
            return self._weighed[1]
        return None if self._policy is None else self._policy(batch.request_ids)

    def _limit_unknown(self) -> int:
        """Short drafts until a few steps have been measured: on a compute-bound machine long ones cost most there."""
        if self.step_time.is_prior_measured:
            return self.k_max
        observed = self.step_time.num_observed
        return next((limit for steps, limit in FIRST_LENGTHS if observed < steps), self.k_max)

    def _describe_cost(self, batch: Batch) -> DraftCost:
        features = StepFeatures(batch.tokens, batch.context_tokens, len(batch.request_ids), 0, 0)
        cost = self.step_time.describe_cost(features)
        return DraftCost(cost.fixed, cost.per_token, cost.per_pass * self._passes_per_draft)

    def _choose(
        self, survival: np.ndarray, caps: np.ndarray, cost: DraftCost, weights: np.ndarray | None, batch: Batch
    ) -> Choice:
        count = len(survival)
        if self._uniform is None and self._graph_sizes:
            padding = self.step_time.coefficients["tokens"]
            return choose_padded(survival, caps, cost, padding, batch.tokens, self._graph_sizes, weights)
        if self._uniform is None:
            return choose_lengths(survival, caps, cost, weights)
        allowed = [length for length in self._uniform if length <= int(caps.min(initial=self.k_max))]
        costs = [cost.fixed + length * (cost.per_token * count + cost.per_pass) for length in allowed]
        # Graphs make a change of length cheap, but following noise is not free either.
        costs = [
            time / HYSTERESIS if length == self._last_passes else time
            for length, time in zip(allowed, costs, strict=True)
        ]
        return choose_uniform(survival, allowed, costs, weights)

    def _explore(self, lengths: np.ndarray, caps: np.ndarray) -> np.ndarray:
        self._steps += 1
        every = EXPLORE_EVERY if self._steps < EXPLORE_AT_FIRST else EXPLORE_SELDOM
        if self._steps % every:
            return lengths
        change = 1 if (self._steps // every) % 2 else -1
        return np.where(lengths > 0, np.clip(lengths + change, 0, caps), 0)

    def _make_probe(self, caps: np.ndarray, cost: DraftCost) -> np.ndarray:
        if self._uniform is not None:
            return np.minimum(caps, next(length for length in self._uniform if length))
        # As many requests as the budget of one interval pays for, in turn: they tell about the others.
        count = len(caps)
        budget = PROBE_SHARE * PROBE_WANTED * cost.fixed - cost.per_pass
        width = count if self._is_surprised else min(count, max(1, int(budget / max(cost.per_token, 1e-9))))
        self._is_surprised = False
        self._turn = (self._turn + width) % count
        lengths = np.zeros(count, np.int64)
        lengths[(self._turn + np.arange(width)) % count] = 1
        return np.minimum(caps, lengths)
