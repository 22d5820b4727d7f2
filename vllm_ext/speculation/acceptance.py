# SPDX-License-Identifier: Apache-2.0
"""How likely drafts are accepted, per request and position, learned from the steps that verified them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from vllm_ext.speculation.change import ChangeDetector

#: Estimates stay inside: nothing observed in a finite number of steps is impossible or certain.
LOWEST, HIGHEST = 0.01, 0.995
#: Trials that the chance of all requests counts for in one request: where requests differ most, and least.
STRENGTHS = (2.0, 60.0)
#: How fast the estimate of how much requests differ moves, per step.
SPREAD_RATE = 0.03
#: Trials that all counts together are worth after a change, at one position.
TRIALS_AFTER_CHANGE = 1.0


class AcceptanceModel:
    """Chances of acceptance of every running request, as discounted counts in arrays indexed by slot.

    Position j of a draft is tried only where the j-1 before it were accepted, so what is estimated is the hazard
    h[j] = P(j accepted | j-1 accepted); the chance that a draft of length k survives is the product of the first k. A
    step that drafted k and accepted a < k saw a successes, one failure, and nothing of the positions behind: censored.

    Counts fade with time; where outcomes change at once (`ChangeDetector`), they are forgotten at once.

    Three levels, each the prior of the next: all positions of all requests, one position of all requests, one position
    of one request. A request whose own positions do better than average carries that to its untried positions.

    Source: SmartSpec keeps one moving average of accepted / drafted for all requests (section 4.2), which is biased by
    the censoring and blind to positions and requests.
    """

    def __init__(
        self,
        k_max: int,
        *,
        initial: float = 0.6,
        shared_strength: float = 0.8,
        request_memory: float = 0.9,
        shared_memory: float = 0.97,
        idle_memory: float = 0.97,
        untried_memory: float = 0.995,
    ) -> None:
        """k_max: longest draft. initial: chance before anything was seen.

        shared_strength: trials that the chance over all positions counts for at one position; how many the chance of
        all requests counts for in one request is learned from how much requests differ. request_memory, shared_memory:
        what a count keeps at each later observation; idle_memory: what a request's counts keep at each step without a
        draft of its own; untried_memory: what the counts of all requests keep of a position that a step did not try.
        Raises ValueError for a k_max below 1.
        """
        if k_max < 1:
            raise ValueError(f"k_max must be at least 1, got {k_max}")
        self.k_max = k_max
        self._initial = initial
        self._shared_strength = shared_strength
        #: Variance of requests' chances around the chance of all: between the two of the prior's bounds at first.
        self._spread = 0.04
        self._request_memory, self._shared_memory, self._idle_memory = request_memory, shared_memory, idle_memory
        self._untried_memory = untried_memory
        self._change = ChangeDetector()
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        #: Discounted successes and trials, [k_max, slots], so that what is done for all requests runs along rows; and
        #: of all requests together, [k_max].
        self._successes = np.zeros((k_max, 0))
        self._trials = np.zeros((k_max, 0))
        self._shared_successes = np.zeros(k_max)
        self._shared_trials = np.zeros(k_max)
        self._positions = np.arange(k_max)[:, None]
        #: The requests asked for last, their slots, and what is predicted of them until something is learned: a step
        #: asks for the same ones when it trims, when it plans, and when it learns.
        self._last_ids: list[Hashable] = []
        self._last_slots = np.zeros(0, np.int64)
        self._last_survival: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def find_slots(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """Slots of requests, int64 [n], not to be written to; an unknown request gets one, at the prior."""
        ids = list(request_ids)
        if ids != self._last_ids:
            slots = self._slots
            found = np.array([slots[rid] if rid in slots else self._add(rid) for rid in ids], np.int64)
            found.flags.writeable = False
            self._last_ids, self._last_slots, self._last_survival = ids, found, None
        return self._last_slots

    def keep_only(self, request_ids: frozenset[Hashable] | set[Hashable] | dict[Hashable, object]) -> None:
        """Forget every request that is not among these."""
        if len(self._slots) > len(request_ids):
            for rid in [rid for rid in self._slots if rid not in request_ids]:
                self.remove(rid)

    def remove(self, request_id: Hashable) -> None:
        """Forget a request; one that was never seen is no error."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
            self._last_ids, self._last_slots, self._last_survival = [], np.zeros(0, np.int64), None

    def observe(self, slots: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from one verified step.

        slots, drafted, accepted: int [n]; drafts of length 0 teach nothing and let the request drift to the prior.
        Raises ValueError where a request accepted more than it drafted, or drafted more than k_max.
        """
        if not len(slots):
            return
        if (accepted > drafted).any() or (drafted > self.k_max).any() or (accepted < 0).any():
            raise ValueError(f"accepted {accepted.tolist()} of drafted {drafted.tolist()} with k_max {self.k_max}")
        first = drafted > 0
        if self._change.observe(self.predict_first(slots)[first], accepted[first] > 0):
            self._forget_outcomes()
        self._last_survival = None
        succeeded = self._positions < accepted
        tried = self._positions < np.minimum(accepted + 1, drafted)
        memory = np.where(first, self._request_memory, self._idle_memory)
        successes, trials = self._successes.take(slots, axis=1), self._trials.take(slots, axis=1)
        successes *= memory
        successes += succeeded
        trials *= memory
        trials += tried
        self._successes[:, slots] = successes
        self._trials[:, slots] = trials
        num_tried = np.count_nonzero(tried, axis=1)
        # What is known of a position that nobody tried fades slowly: it is tried again some time.
        memory = np.where(num_tried > 0, self._shared_memory, self._untried_memory)
        self._shared_successes = self._shared_successes * memory + np.count_nonzero(succeeded, axis=1) / len(slots)
        self._shared_trials = self._shared_trials * memory + num_tried / len(slots)
        if num_tried[0]:
            self._learn_spread(successes, trials)

    def predict_survival(self, slots: np.ndarray) -> np.ndarray:
        """P(the first j drafts are all accepted), j = 1..k_max: float64 [n, k_max], falling along j.

        Not to be written to. In memory positions come first.
        """
        if slots is self._last_slots and self._last_survival is not None:
            return self._last_survival
        survival = self._predict_hazards(slots).T
        for shorter, longer in itertools.pairwise(survival.T):
            longer *= shorter
        survival.flags.writeable = False
        if slots is self._last_slots:
            self._last_survival = survival
        return survival

    def predict_first(self, slots: np.ndarray) -> np.ndarray:
        """P(the first draft is accepted): float64 [n], the first column of `predict_survival`."""
        return self.predict_survival(slots)[:, 0]

    def _predict_hazards(self, slots: np.ndarray) -> np.ndarray:
        """P(j accepted | j-1 accepted): float64 [k_max, n]."""
        shared, pooled = self._predict_shared()
        hazards, trials = self._successes.take(slots, axis=1), self._trials.take(slots, axis=1)
        # A beta distribution with this variance has seen so many trials.
        strength = min(max(pooled * (1 - pooled) / max(self._spread, 1e-9), STRENGTHS[0]), STRENGTHS[1])
        # What a request does over all its positions, against what all requests do at the same positions.
        factor = (np.add.reduce(hazards, axis=0) + strength * pooled) / (shared @ trials + strength * pooled)
        prior = shared[:, None] * factor
        np.minimum(prior, HIGHEST, out=prior)
        prior *= strength
        hazards += prior
        trials += strength
        hazards /= trials
        return np.clip(hazards, LOWEST, HIGHEST, out=hazards)

    def _forget_outcomes(self) -> None:
        """Keep what was learned as a guess: another text, another load, and none of it holds."""
        kept = min(1.0, TRIALS_AFTER_CHANGE / max(float(self._shared_trials.max()), 1e-9))
        self._shared_successes *= kept
        self._shared_trials *= kept
        kept = min(1.0, TRIALS_AFTER_CHANGE / max(float(self._trials.max()), 1e-9))
        self._successes *= kept
        self._trials *= kept

    def _predict_shared(self) -> tuple[np.ndarray, float]:
        """(chance at each position [k_max], chance over all positions) of an average request."""
        strength = self._shared_strength
        total = self._shared_trials.sum()
        pooled = (self._shared_successes.sum() + self._initial) / (total + 1.0)
        shared = (self._shared_successes + strength * pooled) / (self._shared_trials + strength)
        return shared, float(pooled)

    def _learn_spread(self, successes: np.ndarray, trials: np.ndarray) -> None:
        """Method of moments: how far requests are from the chance of all, less what luck alone accounts for.

        successes, trials: counts of the requests of a step, [k_max, n].
        """
        total = np.add.reduce(trials, axis=0)
        known = total > 2.0
        if not known.any():
            return
        shared, _ = self._predict_shared()
        total = total[known]
        expected = (shared @ trials)[known] / total
        rate = np.add.reduce(successes, axis=0)[known] / total
        # Discounted trials: a sum of weights w has the variance of sum(w)^2 / sum(w^2) trials of weight one.
        noise = expected * (1 - expected) / (total * (1 + self._request_memory))
        self._spread += SPREAD_RATE * (float(((rate - expected) ** 2 - noise).mean()) - self._spread)

    def _add(self, request_id: Hashable) -> int:
        if not self._free:
            size = self._trials.shape[1]
            self._free = list(range(size + max(16, size) - 1, size - 1, -1))
            grown = np.zeros((self.k_max, max(16, size)))
            self._successes = np.concatenate([self._successes, grown], axis=1)
            self._trials = np.concatenate([self._trials, grown], axis=1)
        slot = self._free.pop()
        self._slots[request_id] = slot
        self._successes[:, slot] = self._trials[:, slot] = 0.0
        return slot
