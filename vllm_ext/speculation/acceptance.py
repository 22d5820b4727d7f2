# SPDX-License-Identifier: Apache-2.0
"""How likely drafts are accepted, per request and position, learned from the steps that verified them."""

from __future__ import annotations

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
        #: Discounted successes and trials, [slots, k_max]; and of all requests together, [k_max].
        self._successes = np.zeros((0, k_max))
        self._trials = np.zeros((0, k_max))
        self._shared_successes = np.zeros(k_max)
        self._shared_trials = np.zeros(k_max)
        self._positions = np.arange(k_max)

    def __len__(self) -> int:
        return len(self._slots)

    def find_slots(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """Slots of requests, int64 [n]; an unknown request gets one, at the prior."""
        slots = self._slots
        return np.array([slots[rid] if rid in slots else self._add(rid) for rid in request_ids], np.int64)

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
        if self._change.observe(self.predict_first(slots[first]), accepted[first] > 0):
            self._forget_outcomes()
        positions = self._positions
        succeeded = positions < accepted[:, None]
        tried = positions < np.minimum(accepted + 1, drafted)[:, None]
        memory = np.where(drafted > 0, self._request_memory, self._idle_memory)[:, None]
        self._successes[slots] = self._successes[slots] * memory + succeeded
        self._trials[slots] = self._trials[slots] * memory + tried
        # What is known of a position that nobody tried fades slowly: it is tried again some time.
        memory = np.where(tried.any(axis=0), self._shared_memory, self._untried_memory)
        self._shared_successes = self._shared_successes * memory + succeeded.mean(axis=0)
        self._shared_trials = self._shared_trials * memory + tried.mean(axis=0)
        if tried.any():
            self._learn_spread(slots)

    def predict_survival(self, slots: np.ndarray) -> np.ndarray:
        """P(the first j drafts are all accepted), j = 1..k_max: float64 [n, k_max], falling along j."""
        return np.cumprod(self._predict_hazards(slots, self.k_max), axis=1)

    def predict_first(self, slots: np.ndarray) -> np.ndarray:
        """P(the first draft is accepted): float64 [n], the first column of `predict_survival`."""
        return self._predict_hazards(slots, 1)[:, 0]

    def _predict_hazards(self, slots: np.ndarray, count: int) -> np.ndarray:
        """P(j accepted | j-1 accepted) of the first `count` positions: float64 [n, count]."""
        shared, pooled = self._predict_shared()
        successes, trials = self._successes[slots], self._trials[slots]
        # A beta distribution with this variance has seen so many trials.
        strength = float(np.clip(pooled * (1 - pooled) / max(self._spread, 1e-9), *STRENGTHS))
        # What a request does over all its positions, against what all requests do at the same positions.
        expected = trials @ shared
        factor = (successes.sum(axis=1) + strength * pooled) / (expected + strength * pooled)
        prior = np.minimum(shared[:count] * factor[:, None], HIGHEST)
        hazard = (successes[:, :count] + strength * prior) / (trials[:, :count] + strength)
        return np.clip(hazard, LOWEST, HIGHEST)

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

    def _learn_spread(self, slots: np.ndarray) -> None:
        """Method of moments: how far requests are from the chance of all, less what luck alone accounts for."""
        trials = self._trials[slots].sum(axis=1)
        known = trials > 2.0
        if not known.any():
            return
        shared, _ = self._predict_shared()
        trials = trials[known]
        expected = (self._trials[slots[known]] @ shared) / trials
        rate = self._successes[slots[known]].sum(axis=1) / trials
        # Discounted trials: a sum of weights w has the variance of sum(w)^2 / sum(w^2) trials of weight one.
        noise = expected * (1 - expected) / (trials * (1 + self._request_memory))
        self._spread += SPREAD_RATE * (float(((rate - expected) ** 2 - noise).mean()) - self._spread)

    def _add(self, request_id: Hashable) -> int:
        if not self._free:
            size = len(self._trials)
            self._free = list(range(size + max(16, size) - 1, size - 1, -1))
            grown = np.zeros((max(16, size), self.k_max))
            self._successes = np.concatenate([self._successes, grown])
            self._trials = np.concatenate([self._trials, grown])
        slot = self._free.pop()
        self._slots[request_id] = slot
        self._successes[slot] = self._trials[slot] = 0.0
        return slot
