# SPDX-License-Identifier: Apache-2.0
"""How likely drafts are accepted, per request and position, learned from the steps that verified them."""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Sequence

import numpy as np

from vllm_ext.speculation.change import ChangeDetector
from vllm_ext.speculation.goodput import load_compiled

#: Estimates stay inside: nothing observed in a finite number of steps is impossible or certain.
LOWEST, HIGHEST = 0.01, 0.995
#: Trials that the chance of all requests counts for in one request: where requests differ most, and least.
STRENGTHS = (2.0, 60.0)
#: How fast the estimate of how much requests differ moves, per step.
SPREAD_RATE = 0.03
#: A request with fewer trials says nothing about how much requests differ.
LEAST_TRIALS = 2.0
#: What a request's counts keep at each later trial. Where chances never change 0.8 is 0.2 % better (simulated); the
#: texts of real requests repeat what was said for a while and then do not, and 0.65 was 2 to 5 % better there.
REQUEST_MEMORY = 0.7
#: What a step moves the averages of `find_usual` by; more at first.
USUAL_RATE = 0.05
#: Trials that all counts together are worth after a change, at one position.
TRIALS_AFTER_CHANGE = 1.0


def find_usual_rate(num_steps: int) -> float:
    """What the newest of so many steps counts for in an average of usual steps."""
    return max(USUAL_RATE, 1 / num_steps)


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
        request_memory: float = REQUEST_MEMORY,
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
        self._compiled = load_compiled()
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        #: Discounted successes and trials, [slots, k_max, 2], and of all requests together, [k_max, 2].
        self._counts = np.zeros((0, k_max, 2))
        self._shared_counts = np.zeros((k_max, 2))
        #: Tokens that a step makes on average, [slots], and of an average request.
        self._usual, self._shared_usual = np.zeros(0), 1.0
        self._num_steps = 0
        #: The requests asked for last and their slots: a step asks for the same ones when it trims, plans and learns.
        self._last_ids: list[Hashable] = []
        self._last_slots = np.zeros(0, np.int64)
        #: What is predicted of these until something is learned.
        self._last_survival: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def find_slots(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """Slots of requests, int64 [n], not to be written to; an unknown request gets one, at the prior."""
        ids = list(request_ids)
        if ids != self._last_ids:
            slots = self._slots
            found = np.array([slots[rid] if rid in slots else self._add(rid) for rid in ids], np.int64)
            self._last_ids, self._last_slots = ids, found
            self._last_survival = None
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
            self._last_survival = None

    @property
    def hope(self) -> float:
        """How far recent outcomes were better than expected: `ChangeDetector.above`."""
        return self._change.above

    def observe(
        self, slots: np.ndarray, drafted: np.ndarray, accepted: np.ndarray, made: np.ndarray | None = None
    ) -> None:
        """Learn from one verified step.

        slots, drafted, accepted: int [n]; drafts of length 0 teach nothing and let the request drift to the prior.
        made: int [n], tokens that the step put out; None for accepted + 1.
        Raises ValueError where a request accepted more than it drafted, or drafted more than k_max.
        """
        if not len(slots):
            return
        if (accepted > drafted).any() or drafted.max() > self.k_max or accepted.min() < 0:
            raise ValueError(f"accepted {accepted.tolist()} of drafted {drafted.tolist()} with k_max {self.k_max}")
        drafted, accepted = np.ascontiguousarray(drafted, np.int64), np.ascontiguousarray(accepted, np.int64)
        first = self._compiled.sum_first_drafts(self.predict_survival(slots), drafted, accepted)
        if self._change.observe(*first):
            self._forget_outcomes()
        self._num_steps += 1
        rate = find_usual_rate(self._num_steps)
        made = accepted + 1 if made is None else np.ascontiguousarray(made, np.int64)
        self._shared_usual += rate * (float(np.add.reduce(made)) / len(slots) - self._shared_usual)
        has_trials = self._compiled.learn_outcomes(
            self._counts,
            self._shared_counts,
            self._usual,
            slots,
            drafted,
            accepted,
            made,
            rate,
            self._request_memory,
            self._idle_memory,
            self._shared_memory,
            self._untried_memory,
        )
        self._last_survival = None
        if has_trials:
            shared, _ = self._pool()
            spread = self._compiled.measure_spread(self._counts, slots, shared, self._request_memory, LEAST_TRIALS)
            if not math.isnan(spread):
                self._spread += SPREAD_RATE * (spread - self._spread)

    def predict_survival(self, slots: np.ndarray) -> np.ndarray:
        """P(the first j drafts are all accepted), j = 1..k_max: float64 [n, k_max], falling along j; not to be written
        to."""
        if slots is self._last_slots and self._last_survival is not None:
            return self._last_survival
        shared, pooled = self._pool()
        # A beta distribution with this variance has seen so many trials.
        strength = min(max(pooled * (1 - pooled) / max(self._spread, 1e-9), STRENGTHS[0]), STRENGTHS[1])
        survival: np.ndarray = self._compiled.predict_survival(
            self._counts, slots, shared, pooled, strength, LOWEST, HIGHEST
        )
        if slots is self._last_slots:
            self._last_survival = survival
        return survival

    def find_usual(self, slots: np.ndarray) -> np.ndarray:
        """Tokens that a step of each request makes on average, float64 [n], at least 1; of a request that has just
        come, what those of all make."""
        return self._usual[slots]

    def _pool(self) -> tuple[np.ndarray, float]:
        shared, pooled = self._compiled.pool_counts(self._shared_counts, self._initial, self._shared_strength)
        return shared, pooled

    def _forget_outcomes(self) -> None:
        """Keep what was learned as a guess: another text, another load, and none of it holds."""
        for counts in (self._shared_counts, self._counts):
            counts *= min(1.0, TRIALS_AFTER_CHANGE / max(float(counts[..., 1].max(initial=0.0)), 1e-9))
        self._last_survival = None

    def _add(self, request_id: Hashable) -> int:
        if not self._free:
            size = len(self._counts)
            more = max(16, size)
            self._free = list(range(size + more - 1, size - 1, -1))
            self._counts = np.concatenate([self._counts, np.zeros((more, self.k_max, 2))])
            self._usual = np.concatenate([self._usual, np.ones(more)])
        slot = self._free.pop()
        self._slots[request_id] = slot
        self._counts[slot], self._usual[slot] = 0.0, self._shared_usual
        return slot
