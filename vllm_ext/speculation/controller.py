# SPDX-License-Identifier: Apache-2.0
"""Every step's draft lengths: what is verified now, what is drafted next, and what the outcome teaches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.acceptance import AcceptanceModel, Verified, find_usual_rate
from vllm_ext.speculation.chooser import Batch, Decision, LengthChooser, Outlook, Policy, find_share
from vllm_ext.speculation.goodput import (
    Choice,
    DraftCost,
    choose_again,
    choose_lengths,
    choose_padded,
    drop_least,
    value_drafts,
)
from vllm_ext.speculation.probing import HOPE, PROBE_EVERY, ProbeBudget
from vllm_ext.speculation.step_time import StepFeatures, StepTimeModel

__all__ = ["PROBE_EVERY", "Batch", "Decision", "FinishedStep", "GoodputController", "Policy"]

#: While requests speculate, one step in so many drafts one more or one less: lengths that never change do not tell what
#: a draft costs. Often at first, then seldom.
EXPLORE_EVERY, EXPLORE_SELDOM, EXPLORE_AT_FIRST = 12, 96, 300

#: Steps that are learned from together of which half are timed.
MANY_STEPS = 8

#: What must be left, when a lookup's probe is offered, beyond what it is believed to cost.
OFFER_SPARE = 0.25


class FinishedStep(NamedTuple):
    """What there is to learn from a step."""

    request_ids: Sequence[Hashable]
    #: Verified and accepted drafts of each request, and tokens put out.
    drafted: Sequence[int]
    accepted: Sequence[int]
    made: Sequence[int]
    #: Of the whole step, tokens without padding and without those of prompts; None where they are not known.
    features: StepFeatures | None = None
    #: Of the same; None where its time says nothing, as beside prompts.
    milliseconds: float | None = None
    #: Whether the drafts that this step verified come from a plan that was a probe.
    is_probe: bool = False
    #: Whether `note` was told of it.
    is_noted: bool = False


class GoodputController(LengthChooser):
    """Draft lengths from measured acceptance and measured step time.

    plan_drafts   how much to draft for the next step: drafting and verifying cost
    trim_drafts   how much of given drafts to verify: drafting is paid already
    trim_again    the same while a plan stands, by the newest outcomes
    note          what a step drafted and accepted, for trim_again
    observe       the same and what it took, to learn from

    A lookup drafts in no time what a trim leaves out: there a plan is as long as the next trim may want it, whatever
    the outcome of the step in between, which decides more than all before it (`AcceptanceModel`).

    k = 0 is never for ever: when nothing has been verified for a while, some requests get a short draft now and then,
    for a fixed small part of the time (`ProbeBudget`). Lengths depend on past outcomes only, never on the drafts
    themselves, so the tokens that come out are those of the target model.

    Beside a prompt a draft is worth, and takes, what it does in any step: the prompt's own time passes anyway.
    What progress with a prompt is worth is not modelled.

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
        passes: Sequence[int] | None = None,
        probe_every: int = PROBE_EVERY,
        policy: Policy | None = None,
        plans_drafts: bool = True,
        trims: bool = True,
        kept_shapes: int = 0,
        is_ragged: bool = True,
    ) -> None:
        """k_max: longest draft.

        uniform_lengths: allowed lengths where all requests must have the same one; None for a length each. graph_sizes:
        tokens that forward passes are padded to. passes: int [k_max + 1], forward passes of the drafter in a step whose
        longest draft is k; None for a drafter that is no model and makes none. probe_every: steps before the first
        probe. policy: weights of requests. plans_drafts: whether plan_drafts is asked; where the number of drafts is
        not ours, trim_drafts probes. trims: whether trim_drafts is asked. kept_shapes: how many numbers of tokens the
        device has kernels at hand for, others being prepared anew; 0 where that is no matter. is_ragged: whether the
        drafter makes as many drafts for each request as a plan says, and not the longest number for all.
        Raises ValueError for lengths that k_max does not allow, and for passes that do not fit it.
        """
        super().__init__(
            k_max,
            AcceptanceModel(k_max) if acceptance is None else acceptance,
            step_time or StepTimeModel(),
            uniform_lengths=uniform_lengths,
            graph_sizes=graph_sizes,
            passes=passes,
            policy=policy,
            trims=trims and plans_drafts,
            kept_shapes=kept_shapes,
            is_ragged=is_ragged,
        )
        self._plans_drafts = plans_drafts
        self._probes = ProbeBudget(probe_every)
        #: Where in the batch the last probe ended: the next one asks those behind.
        self._turn = 0
        self._steps = self._explored = self._num_stretched = 0
        if not plans_drafts:
            # Whoever plans them asks for all.
            self._drafting = (self._passes[-1], 0)
        #: Milliseconds, once and of each request's draft, of a probe that was offered to all and that no trim has cut
        #: yet.
        self._offered: tuple[float, float] | None = None
        #: Whether the last trim left nothing of what it was given.
        self._is_cut = False

    def plan_drafts(self, batch: Batch, steps: int = 1, trim_time: float = 0.0) -> Decision:
        """Draft lengths for the next step of these requests.

        steps: how many there were since the last plan, with this one. A plan that `may_stand` is good for more than one
        (`pace.Pace`); what they drafted and accepted is to be observed before the next plan. trim_time: milliseconds
        that trimming takes in each of its steps: few drafts are not worth that, and get lengths that are good after
        any outcome.
        """
        if steps != self._stood:
            # Values are others where lengths stand for longer.
            self._stood, self._last_outlook = steps, None
        outlook, self._last_outlook = self._look_ahead(batch), None
        cost, verification = self._describe_cost(batch), self._describe_verification(batch)
        choice = self._choose(outlook, cost)
        most = np.maximum(choice.lengths, self._find_most(outlook, cost)) if self._drafts_ahead else choice.lengths
        trims = self._trims and self._is_worth_trimming(most, verification, trim_time)
        if trims or not trim_time or self._uniform is not None:
            choice = choice._replace(lengths=most)
        else:
            choice = self._choose_by(outlook, self.acceptance.predict_mean, cost)
        decision = self._plan(outlook, choice, steps)._replace(trims=trims)
        features = self.describe_step(batch, 0, decision.lengths)
        self._drafting = features.passes, features.drafted
        if decision.may_stand:
            self._standing_price, self._standing_cost = outlook.price, verification
        return decision

    def trim_drafts(self, batch: Batch, drafted: np.ndarray, is_probe: bool = False) -> np.ndarray:
        """How many of each request's drafts to verify, int64 [n], at most `drafted`.

        is_probe: whether these drafts come from a plan that was a probe. A probe of a drafter that is a model is
        verified whole; one of a drafter that is none is offered to all, and those that have drafts are tried in turn.
        """
        if not len(drafted) or (is_probe and (self._has_passes or self._uniform is not None)):
            return drafted
        outlook = self._look_ahead(batch)
        if is_probe:
            self._offered = None
            return self._probe_drafts(outlook, drafted)
        cost = self._describe_verification(batch)
        choice = self._choose_each(outlook, drafted, cost)
        lengths = choice.lengths
        if not self._graph_sizes:
            drop_least(lengths, outlook.values, batch.tokens, self._find_multiple(len(lengths)))
        if not self._plans_drafts:
            self._probes.earn(choice.milliseconds, cost.once + cost.per_token)
        is_cut, self._is_cut = self._is_cut, False
        if not lengths.any():
            # Neither a plan nor anything verified: without a probe this would be for ever.
            self._is_cut = bool(drafted.any())
            if self._is_cut:
                self._probes.wait()
                lengths = self._probe_drafts(outlook, drafted)
        elif is_cut or not self._plans_drafts:
            self._probes.rest()
        return lengths

    def trim_again(self, batch: Batch, drafted: np.ndarray) -> np.ndarray:
        """As `trim_drafts` while the last plan stands: by what was noted since then, and what it knew of times.

        Probes are none of its business: they have a plan of their own, a few steps later.
        """
        model, price, cost = self.acceptance, self._standing_price, self._standing_cost
        slots = model.find_slots(batch.request_ids)
        weights = None if self._policy is None else self._policy(batch.request_ids)
        if not self._graph_sizes:
            return choose_again(
                model.describe(slots),
                model.usual,
                drafted,
                cost,
                price,
                find_share(self._stood),
                weights,
                self._find_multiple(len(slots)),
            )
        outlook = self._value(batch, slots, model.predict_survival(slots), price, weights)
        return self._choose_each(outlook, drafted, cost).lengths

    def note(self, request_ids: Sequence[Hashable], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """What a step verified and accepted, to be observed before the next plan."""
        if request_ids:
            self.acceptance.note(self.acceptance.find_slots(request_ids), drafted, accepted)

    def observe(self, steps: Sequence[FinishedStep]) -> None:
        """Learn from finished steps, in their order."""
        verified = []
        for step in steps:
            if step.is_probe and self._offered and any(step.drafted):
                # Nobody asked trim_drafts: all of it was verified.
                (common, each), width = self._offered, sum(count > 0 for count in step.drafted)
                self._probes.pay(common + each * width, width)
                self._offered = None
            if step.is_probe or (self._probes.is_awaited and any(step.drafted)):
                self._probes.hear()
            slots = self.acceptance.find_slots(step.request_ids)
            verified.append(Verified(slots, step.drafted, step.accepted, step.made, step.is_noted))
        self.acceptance.observe_all(verified)
        for step in steps:
            if step.features is not None:
                self._learn_stretch(step.features)
        # Steps of one plan take about the same: half of them say enough. The first verifies the drafts of the plan
        # before, which may have been a trial: it is among them.
        for step in steps if len(steps) < MANY_STEPS else steps[::2]:
            if step.features is not None and step.milliseconds is not None:
                self.step_time.observe(self._pad(step.features), step.milliseconds)

    def forget(self, running: Mapping[Hashable, object]) -> None:
        """Drop every request that is not among the running ones."""
        self.acceptance.keep_only(running)

    def warm_up(self) -> None:
        """Compile what steps run (`compiled`): seconds on a machine's first start, and no request waits for them."""
        model, drafted = AcceptanceModel(self.k_max), np.array([self.k_max])
        slots = model.find_slots([0])
        model.note(slots, [self.k_max], [self.k_max])
        model.observe(slots, drafted, drafted)
        survival, cost = model.predict_survival(slots), DraftCost(1.0, 1e-3)
        model.predict_best(slots)
        model.predict_mean(slots)
        values = value_drafts(survival, model.find_usual(slots), 1.0)
        if self._uniform is None:
            if self._graph_sizes:
                choose_padded(survival, values, self.k_max, cost, 1.0, 1e-3, 1, self._graph_sizes)
            choose_lengths(survival, values, self.k_max, cost, 1.0)
            choose_again(model.describe(slots), model.usual, drafted, cost, 1.0, 1.0)
            drop_least(drafted, values, 1, 1)

    def _learn_stretch(self, features: StepFeatures) -> None:
        """Predicted, not measured: a spike says nothing, and the time of prompts passes whatever is drafted."""
        plain = self._predict_plain(features.requests, features.context_tokens)
        self._num_stretched += 1
        self._stretch += find_usual_rate(self._num_stretched) * (self.predict(features) / plain - self._stretch)

    def _plan(self, outlook: Outlook, choice: Choice, steps: int) -> Decision:
        if choice.lengths.any():
            if not self._is_cut:
                self._probes.rest()
            self._probes.earn(choice.milliseconds, 0.0, steps)
            return self._explore(outlook, choice, steps)
        self._is_cut = False
        width, common, each = self._describe_probe(outlook)
        # A drafter that is no model is asked by all, most of whom may find nothing. What is then tried is paid for in
        # the next step, whose estimates are a little different.
        is_offered, asking, spare = self._uniform is None and not self._has_passes, 0.0, 0.0
        if is_offered:
            asking = self.step_time.coefficients["drafted"] * len(choice.lengths)
            spare = OFFER_SPARE * (common + each)
        self._probes.earn(choice.milliseconds, asking + spare + common + each, steps)
        self._probes.wait(steps)
        hope = self.acceptance.hope
        width = self._probes.find_width(width, choice.milliseconds, asking + spare + common, each, hope)
        if not width:
            # What the last probe found, and what looks like a change for the better, is followed at once.
            return Decision(*choice, False, not (self._probes.is_awaited or hope > HOPE))
        if self._uniform is not None:
            lengths = np.full(len(choice.lengths), self._uniform[1], np.int64)
        elif self._has_passes:
            lengths = self._take_turns(np.ones(len(choice.lengths), np.int64), width)
        else:
            # Few may have drafts: all are asked, and trim_drafts tries as many as the budget has.
            lengths = np.ones(len(choice.lengths), np.int64)
        if is_offered:
            self._probes.offer(asking)
            self._offered = common, each
        else:
            self._probes.pay(common + each * width, width)
        return self._describe_decision(outlook, lengths, True)

    def _describe_probe(self, outlook: Outlook) -> tuple[int, float, float]:
        """(how many can be asked, milliseconds that a probe loses for all, for each)."""
        cost, count = self._describe_cost(outlook.batch), len(outlook.survival)
        length = 1 if self._uniform is None else self._uniform[1] if len(self._uniform) > 1 else 0
        if not length:
            return 0, 0.0, 0.0
        common = cost.per_pass * (self._passes[length] - self._passes[0]) + cost.once
        each, gain = cost.per_token * length, self._value_step(outlook, length)
        if self._uniform is not None:
            return 1, 0.0, self._probes.find_loss(common + each * count, gain * count)
        return count, common, self._probes.find_loss(each, gain)

    def _value_step(self, outlook: Outlook, length: int) -> float:
        """Milliseconds of a step that drafts of this length are believed to save, of an average request."""
        return float(np.add.reduce(outlook.values[:, :length], axis=None)) / len(outlook.values) / outlook.price

    def _probe_drafts(self, outlook: Outlook, drafted: np.ndarray) -> np.ndarray:
        """One draft of as many requests that have any as the budget allows: int64 [n]."""
        cost = self._describe_verification(outlook.batch)
        each = self._probes.find_loss(cost.per_token, self._value_step(outlook, 1))
        count = int(np.count_nonzero(drafted))
        width = self._probes.find_width(count, cost.fixed, cost.once, each, self.acceptance.hope)
        if not width:
            return np.zeros(len(drafted), np.int64)
        self._probes.pay(cost.once + each * width, width)
        return self._take_turns(drafted, width)

    def _take_turns(self, drafted: np.ndarray, width: int) -> np.ndarray:
        """One draft of `width` requests that have drafts, those first that come after the last ones: int64 [n]."""
        rows = np.flatnonzero(drafted)
        rows = np.roll(rows, -int(np.searchsorted(rows, self._turn)))[:width]
        self._turn = (int(rows[-1]) + 1) % len(drafted)
        lengths = np.zeros(len(drafted), np.int64)
        lengths[rows] = 1
        return lengths

    def _explore(self, outlook: Outlook, choice: Choice, steps: int) -> Decision:
        """The choice, or now and then one with other lengths."""
        before, self._steps = self._steps, self._steps + steps
        every = EXPLORE_EVERY if self._steps < EXPLORE_AT_FIRST else EXPLORE_SELDOM
        if self._steps // every == before // every:
            return Decision(*choice, False, not self._is_cut)
        # Not by the number of steps, of which a plan that stands takes several at once.
        self._explored += 1
        lengths, change = choice.lengths, 1 if self._explored % 2 else -1
        if self._uniform is None:
            # Those that draft nothing go on so.
            lengths = np.where(lengths > 0, np.clip(lengths + change, 0, self._limit_unknown()), 0)
        else:
            place, most = self._uniform.index(self._last_length), self._limit_unknown()
            longer = change > 0 and place + 1 < len(self._uniform) and self._uniform[place + 1] <= most
            lengths = np.full(len(lengths), self._uniform[place + 1 if longer else place - 1], np.int64)
        return self._describe_decision(outlook, lengths, False)
