# SPDX-License-Identifier: Apache-2.0
"""How likely drafts are accepted, per request and position, learned from the steps that verified them."""

from __future__ import annotations

import itertools
from collections.abc import Container, Hashable, Sequence
from typing import NamedTuple

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


class _Known(NamedTuple):
    """What is known of the requests of a batch, and of all requests at the time."""

    #: Discounted successes and trials, float64 [2, k_max, n].
    counts: np.ndarray
    #: Successes of each request over all its positions, and what an average request had in its place, float64 [n].
    succeeded: np.ndarray
    expected: np.ndarray
    #: Chances of an average request: at each position, float64 [k_max], and over all positions.
    shared: np.ndarray
    pooled: float


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
        shared_memory: float = 0.985,
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
        #: Discounted successes and trials, [2, k_max, slots], so that what is done for all requests runs along rows;
        #: and of all requests together, [2, k_max].
        self._counts = np.zeros((2, k_max, 0))
        self._shared_counts = np.zeros((2, k_max))
        self._positions = np.arange(k_max)[:, None]
        #: The requests asked for last and their slots: a step asks for the same ones when it trims, plans and learns.
        self._last_ids: list[Hashable] = []
        self._last_slots = np.zeros(0, np.int64)
        #: What is known and predicted of these until something is learned.
        self._last_known: _Known | None = None
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
            self._last_ids, self._last_slots = ids, found
            self._last_known = self._last_survival = None
        return self._last_slots

    def keep_only(self, request_ids: Container[Hashable]) -> None:
        """Forget every request that is not among these."""
        gone = [rid for rid in self._slots if rid not in request_ids]
        for rid in gone:
            self.remove(rid)

    def remove(self, request_id: Hashable) -> None:
        """Forget a request; one that was never seen is no error."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
            self._last_ids, self._last_slots = [], np.zeros(0, np.int64)
            self._last_known = self._last_survival = None

    @property
    def hope(self) -> float:
        """How far recent outcomes were better than expected: `ChangeDetector.above`."""
        return self._change.above

    def observe(self, slots: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from one verified step.

        slots, drafted, accepted: int [n]; drafts of length 0 teach nothing and let the request drift to the prior.
        Raises ValueError where a request accepted more than it drafted, or drafted more than k_max.
        """
        if not len(slots):
            return
        if (accepted > drafted).any() or drafted.max() > self.k_max or accepted.min() < 0:
            raise ValueError(f"accepted {accepted.tolist()} of drafted {drafted.tolist()} with k_max {self.k_max}")
        first, passed, expected = drafted > 0, accepted > 0, self.predict_first(slots)
        if not first.all():
            expected, passed = expected[first], passed[first]
        if self._change.observe(expected, passed):
            self._forget_outcomes()
        # Drafts that succeeded and drafts that were tried, as numbers of positions; then position by position.
        reached = np.array([accepted, np.minimum(accepted + 1, drafted)])
        outcomes = self._positions < reached[:, None, :]
        counts = self._find_known(slots).counts
        counts *= np.where(first, self._request_memory, self._idle_memory)
        counts += outcomes
        self._counts[:, :, slots] = counts
        totals = np.count_nonzero(outcomes, axis=2)
        # What is known of a position that nobody tried fades slowly: it is tried again some time.
        self._shared_counts *= np.where(totals[1] > 0, self._shared_memory, self._untried_memory)
        self._shared_counts += totals / len(slots)
        known = self._summarize(counts)
        self._last_known, self._last_survival = known if slots is self._last_slots else None, None
        if totals[1, 0]:
            self._learn_spread(known)

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
        (successes, trials), succeeded, expected, shared, pooled = self._find_known(slots)
        # A beta distribution with this variance has seen so many trials.
        strength = min(max(pooled * (1 - pooled) / max(self._spread, 1e-9), STRENGTHS[0]), STRENGTHS[1])
        # What a request does over all its positions, against what all requests do at the same positions.
        factor = (succeeded + strength * pooled) / (expected + strength * pooled)
        hazards = shared[:, None] * factor
        np.minimum(hazards, HIGHEST, out=hazards)
        hazards *= strength
        hazards += successes
        hazards /= trials + strength
        return np.clip(hazards, LOWEST, HIGHEST, out=hazards)

    def _find_known(self, slots: np.ndarray) -> _Known:
        if slots is not self._last_slots:
            return self._summarize(self._counts.take(slots, axis=2))
        if self._last_known is None:
            self._last_known = self._summarize(self._counts.take(slots, axis=2))
        return self._last_known

    def _summarize(self, counts: np.ndarray) -> _Known:
        """counts: float64 [2, k_max, n]."""
        strength = self._shared_strength
        successes, trials = self._shared_counts
        total_successes, total_trials = np.add.reduce(self._shared_counts, axis=1).tolist()
        pooled = (total_successes + self._initial) / (total_trials + 1.0)
        shared = (successes + strength * pooled) / (trials + strength)
        return _Known(counts, np.add.reduce(counts[0], axis=0), shared @ counts[1], shared, pooled)

    def _forget_outcomes(self) -> None:
        """Keep what was learned as a guess: another text, another load, and none of it holds."""
        for counts in (self._shared_counts, self._counts):
            counts *= min(1.0, TRIALS_AFTER_CHANGE / max(float(counts[1].max()), 1e-9))
        self._last_known = self._last_survival = None

    def _learn_spread(self, known: _Known) -> None:
        """Method of moments: how far requests are from the chance of all, less what luck alone accounts for."""
        trials, succeeded, expected = known.counts[1], known.succeeded, known.expected
        total, squares = np.add.reduce(trials, axis=0), np.einsum("ij,ij->j", trials, trials)
        enough = total > 2.0
        if not enough.all():
            if not enough.any():
                return
            total, squares, succeeded, expected = total[enough], squares[enough], succeeded[enough], expected[enough]
        expected = expected / total
        # Weights m^0 .. m^(t-1) add up to w and their squares to w (2 - (1 - m) w) / (1 + m).
        memory = self._request_memory
        squares = (2 * total - (1 - memory) * squares) / (1 + memory)
        noise = expected * (1 - expected) * squares / np.square(total)
        surplus = np.square(succeeded / total - expected) - noise
        self._spread += SPREAD_RATE * (float(np.add.reduce(surplus)) / len(surplus) - self._spread)

    def _add(self, request_id: Hashable) -> int:
        if not self._free:
            size = self._counts.shape[2]
            more = max(16, size)
            self._free = list(range(size + more - 1, size - 1, -1))
            self._counts = np.concatenate([self._counts, np.zeros((2, self.k_max, more))], axis=2)
        slot = self._free.pop()
        self._slots[request_id] = slot
        self._counts[:, :, slot] = 0.0
        return slot
