# SPDX-License-Identifier: Apache-2.0
"""Every step's draft lengths: what is verified now, what is drafted next, and what the outcome teaches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.acceptance import AcceptanceModel
from vllm_ext.speculation.goodput import (
    Choice,
    DraftCost,
    choose_lengths,
    choose_padded,
    choose_uniform,
    value_drafts,
)
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


class _Outlook(NamedTuple):
    """What is believed of a batch's drafts: chances [n, k_max], the policy's weights, and `value_drafts` of both (None
    where all lengths are the same)."""

    batch: Batch
    survival: np.ndarray
    weights: np.ndarray | None
    values: np.ndarray | None


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
        #: What was trimmed, and what would be drafted next for the same batch: until that is planned.
        self._prepared: tuple[_Outlook, Choice] | None = None

    def plan_drafts(self, batch: Batch, caps: np.ndarray | None = None) -> Decision:
        """Draft lengths for the next step of these requests. caps: int [n], the longest allowed; None for k_max."""
        outlook, choice, limits = self._find_choice(batch, caps)
        self._prepared = None
        if passes := int(choice.lengths.max(initial=0)):
            self._since_draft = 0
            self._probe_interval = self._probe_every
            self._last_passes = passes
            lengths = choice.lengths if self._uniform is not None else self._explore(choice.lengths, limits)
            return Decision(lengths, choice.tokens, choice.milliseconds, False)
        self._last_passes = 0
        self._since_draft += 1
        if self._since_draft >= self._probe_interval and np.max(limits, initial=0) > 0:
            self._since_draft, cost = 0, self._describe_cost(batch)
            lengths = self._make_probe(np.broadcast_to(limits, choice.lengths.shape), cost)
            tokens = choice.tokens + float((outlook.survival * (np.arange(self.k_max) < lengths[:, None])).sum())
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
        outlook = self._look_ahead(batch)
        features = StepFeatures(batch.tokens, batch.context_tokens, len(drafted), 0, 0)
        cost = self.step_time.describe_verification(features)
        lengths = choose_lengths(outlook.survival, drafted, cost, outlook.weights, outlook.values).lengths
        # Most often the next step is planned for the same batch. Here everything that takes is in the processor's
        # caches; after vLLM's scheduling it takes three times as long.
        self._prepared = (outlook, self._choose(outlook, self._limit_unknown()))
        return lengths

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
        self._prepared = None
        slots = self.acceptance.find_slots(request_ids)
        if self._last_passes == 0 and (tried := drafted > 0).any():
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

    def _look_ahead(self, batch: Batch) -> _Outlook:
        survival = self._predict(batch)
        weights = None if self._policy is None else self._policy(batch.request_ids)
        return _Outlook(batch, survival, weights, value_drafts(survival, weights) if self._uniform is None else None)

    def _predict(self, batch: Batch) -> np.ndarray:
        return self.acceptance.predict_survival(self.acceptance.find_slots(batch.request_ids))

    def _find_choice(self, batch: Batch, caps: np.ndarray | None) -> tuple[_Outlook, Choice, np.ndarray | int]:
        """What the next step should draft, and the longest drafts that were allowed."""
        most = self._limit_unknown()
        if caps is None and self._prepared is not None:
            outlook, choice = self._prepared
            # The same array: the same requests, of whom nothing was learned since.
            if outlook.survival is self._predict(batch) and outlook.batch[1:] == batch[1:]:
                return outlook, choice, most
        limits = most if caps is None else np.minimum(caps, most)
        outlook = self._look_ahead(batch)
        return outlook, self._choose(outlook, limits), limits

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

    def _choose(self, outlook: _Outlook, caps: np.ndarray | int) -> Choice:
        batch, survival, weights, values = outlook
        cost = self._describe_cost(batch)
        if self._uniform is None and self._graph_sizes:
            padding = self.step_time.coefficients["tokens"]
            return choose_padded(survival, caps, cost, padding, batch.tokens, self._graph_sizes, weights, values)
        if self._uniform is None:
            return choose_lengths(survival, caps, cost, weights, values)
        allowed = [length for length in self._uniform if length <= np.min(caps, initial=self.k_max)]
        costs = [cost.fixed + length * (cost.per_token * len(survival) + cost.per_pass) for length in allowed]
        # Graphs make a change of length cheap, but following noise is not free either.
        costs = [
            time / HYSTERESIS if length == self._last_passes else time
            for length, time in zip(allowed, costs, strict=True)
        ]
        return choose_uniform(survival, allowed, costs, weights)

    def _explore(self, lengths: np.ndarray, caps: np.ndarray | int) -> np.ndarray:
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
